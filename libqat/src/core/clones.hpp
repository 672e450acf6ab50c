#pragma once

// Functions that are compiled for several instruction sets; the loader takes the best one that runs.

/// Into every clone, for its own instruction set.
#define QAT_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define QAT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define QAT_CLONES
#endif
