// BBB_HD marks a function that compiles for the host and, under nvcc, for the device.
#pragma once

#ifdef __CUDACC__
#define BBB_HD __host__ __device__ __forceinline__
#else
#define BBB_HD inline
#endif
