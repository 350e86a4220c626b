// The kinds of numbers kernels read and write.
#pragma once

namespace sra {

enum class Number { kFloat, kBFloat16, kHalf };

}  // namespace sra
