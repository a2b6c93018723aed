#include "cuda/encoder_kernels.cuh"  // compiled for the host; it defines its table
