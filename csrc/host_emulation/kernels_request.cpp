#include "cuda/request_scoring.cuh"  // compiled for the host; it defines its table
