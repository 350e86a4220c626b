// Copies that go past the caches, for what is not read again soon.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace sra::cpu {

// memcpy that does not first read the target's lines from memory.
inline void stream_copy(void* target, const void* source, int64_t bytes) {
#if defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(target) % 16 == 0 && bytes % 16 == 0) {
    auto* to = static_cast<__m128i*>(target);
    const auto* from = static_cast<const __m128i*>(source);
    for (int64_t i = 0; i < bytes / 16; ++i) _mm_stream_si128(to + i, _mm_loadu_si128(from + i));
    _mm_sfence();
    return;
  }
#endif
  std::memcpy(target, source, bytes);
}

}  // namespace sra::cpu
