#include "cuda/resilient_batch_norm.cuh"  // compiled for the host; it defines its table
