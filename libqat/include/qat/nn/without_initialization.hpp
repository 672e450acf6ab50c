#pragma once

namespace qat::nn {

/// While it lives, qat::nn layers that this thread makes leave their parameters as the allocator gave them:
/// for modules whose numbers are read from a file right afterwards. Drawing 135 million random numbers first
/// takes longer than reading them.
class WithoutInitialization {
 public:
  WithoutInitialization() noexcept;
  ~WithoutInitialization();
  WithoutInitialization(const WithoutInitialization&) = delete;
  WithoutInitialization& operator=(const WithoutInitialization&) = delete;

  /// Whether one lives on this thread.
  static bool active() noexcept;

 private:
  bool before_;
};

}  // namespace qat::nn
