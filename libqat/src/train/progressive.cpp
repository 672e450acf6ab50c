#include <string>

#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"
#include "train/schedule.hpp"

namespace qat::train {
namespace {

/// Weights that ship in few bits train in more of them first.
class Progressive : public Schedule {
 public:
  explicit Progressive(Training& training) : training_(training) {
    const PreparedModel& model = training.model;
    for (std::size_t i = 0; i < model.quantizers().size(); ++i) {
      const auto& quantizer = model.quantizers()[i];
      if (!quantizer || grid::find(quantizer->scheme().weight).info().is_float) continue;
      for (std::size_t k = 0; k < training.options.progressive.size(); ++k) check(i, k);
    }
  }
  ~Progressive() override {
    try {
      use(training_.options.progressive.size());
    } catch (const Error&) {
      // A latent that is not finite has no scales: what was wrong with it has been said.
    }
  }

  void begin_step(int64_t step) override {
    const auto& stages = training_.options.progressive;
    std::size_t stage = 0;
    while (stage < stages.size() && step > steps_of(training_.options, stages[stage].until)) ++stage;
    // A resumed run builds its optimizer for the stage that it is in.
    if (use(stage) || !begun_) training_.follow_grids(began_after(stage));
    begun_ = true;
  }

 private:
  /// Whether weight `slot` trains in that stage's grid: one of more bits than it ships in.
  bool takes(std::size_t slot, std::size_t stage) const {
    const auto& quantizer = training_.model.quantizers()[slot];
    if (!quantizer || stage == training_.options.progressive.size()) return false;
    const grid::Info& own = grid::find(quantizer->scheme().weight).info();
    const grid::Info& other = grid::find(training_.options.progressive[stage].grid).info();
    return !own.is_float && other.bits > own.bits;
  }

  const std::string& grid_in(std::size_t slot, std::size_t stage) const {
    static const std::string none;
    return takes(slot, stage) ? training_.options.progressive[stage].grid : none;
  }

  /// The step after which the grids of a stage came into use.
  int64_t began_after(std::size_t stage) const {
    for (; stage > 0; --stage) {
      for (std::size_t i = 0; i < training_.model.quantizers().size(); ++i) {
        if (grid_in(i, stage) != grid_in(i, stage - 1)) {
          return steps_of(training_.options, training_.options.progressive[stage - 1].until);
        }
      }
    }
    return 0;
  }

  void check(std::size_t slot, std::size_t stage) const {
    const at::Tensor latent = training_.model.slots()[slot].get();
    const std::string& name = training_.options.progressive[stage].grid;
    const int64_t width = latent.numel() / latent.size(0);
    if (!takes(slot, stage) || grid::find(name).divides(width)) return;
    throw ArgumentError("Trainer: options: progressive[" + std::to_string(stage) +
                        "]: " + training_.model.slots()[slot].name + ": expected rows of whole " + name +
                        " blocks, got " + std::to_string(width) + " weights");
  }

  /// True when a grid changed. stage: the number of stages means none.
  bool use(std::size_t stage) {
    bool changed = false;
    for (std::size_t i = 0; i < training_.model.quantizers().size(); ++i) {
      const auto& quantizer = training_.model.quantizers()[i];
      if (!quantizer) continue;
      const std::string& grid = grid_in(i, stage);
      if (quantizer->training_grid() == grid) continue;
      quantizer->set_training_grid(grid, training_.model.slots()[i].get().detach());
      changed = true;
    }
    return changed;
  }

  Training& training_;
  bool begun_ = false;
};

}  // namespace

void add_progressive(Schedules& schedules, Training& training) {
  if (!training.options.progressive.empty()) schedules.push_back(std::make_unique<Progressive>(training));
}

}  // namespace qat::train
