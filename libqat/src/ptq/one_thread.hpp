#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

namespace qat::ptq {

/// work(i) for i in 0 .. count - 1, side by side, where BLAS and LAPACK use one thread each, which they do
/// inside a parallel region: with several, their number decides the order of sums, and so the last bits.
template <class Work>
void in_one_thread_each(int64_t count, const Work& work) {
  at::parallel_for(0, std::max<int64_t>(count, at::get_num_threads() + 1), 1,
                   [&](int64_t begin, int64_t end) {
                     const at::NoGradGuard no_grad;
                     for (int64_t i = begin; i < std::min(end, count); ++i) work(i);
                   });
}

/// One piece of work, likewise.
template <class Work>
void in_one_thread(const Work& work) {
  in_one_thread_each(1, [&](int64_t) { work(); });
}

}  // namespace qat::ptq
