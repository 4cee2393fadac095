/* As much of a CUDA driver as autograd asks for when all tensors are fake: one H100 that computes nothing.
 * Preloaded as the runtime, and found as libcuda.so.1. */
#include <string.h>

int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaGetDeviceProperties_v2(char *properties, int device) {
    memset(properties, 0, 1032); /* of CUDA 12: compute capability at 360, processors at 388 */
    *(int *)(properties + 360) = 9;
    *(int *)(properties + 388) = 132;
    return 0;
}
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "a fake driver's"; return 0; }
