// What a thread does between two looks at what it spins on.
#ifndef KERNELS_BASE_PAUSE_H_
#define KERNELS_BASE_PAUSE_H_

namespace dejavu {

// 10 to 40 ns, in which the other thread of a core runs faster.
inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace dejavu

#endif  // KERNELS_BASE_PAUSE_H_
