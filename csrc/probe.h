// What the machine allows at most, free of torch: the limits that benchmarks hold the kernels against.
#pragma once

#include <cstdint>
#include <string>

namespace owlet {

// GB/s at which the threads together read `bytes` of memory over and over, each its own share: what
// decoding with that many bytes of weights could reach, had it nothing else to do.
double read_bandwidth(int64_t bytes, int threads);

// GOP/s (a multiply-add is two operations) of the int8 dot product of an instruction set, from and to
// registers. Throws std::invalid_argument for one that this CPU does not have.
double dot_peak(int threads, const std::string& isa);

}  // namespace owlet
