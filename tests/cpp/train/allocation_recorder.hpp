#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <cstddef>

/// Records what the CPU allocator is asked for while it lives.
class Recorder : public c10::Allocator {
 public:
  Recorder() : base_(c10::GetCPUAllocator()) { c10::SetCPUAllocator(this, /*priority=*/1); }
  ~Recorder() override { c10::SetCPUAllocator(base_, 1); }

  c10::DataPtr allocate(std::size_t bytes) override {
    std::size_t seen = largest_;
    while (bytes > seen && !largest_.compare_exchange_weak(seen, bytes)) {
    }
    if (bytes == watched_) ++hits_;
    return base_->allocate(bytes);
  }
  void copy_data(void* to, const void* from, std::size_t count) const override {
    base_->copy_data(to, from, count);
  }
  void watch(std::size_t bytes) { watched_ = bytes; }
  std::size_t largest() const { return largest_; }
  int hits() const { return hits_; }

 private:
  c10::Allocator* base_;
  std::size_t watched_ = 0;
  std::atomic<std::size_t> largest_{0};
  std::atomic<int> hits_{0};
};
