// The kinds of numbers CPU kernels read and write.
#pragma once

namespace sra::cpu {

enum class Number { kFloat, kBFloat16, kHalf };

}  // namespace sra::cpu
