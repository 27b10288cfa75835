// CUDA's runtime, driver and BLAS for a machine without a GPU: every call succeeds and does nothing.
// Memory is the host's, zeros that nobody writes; kernels are counted, not run. Preloaded as
// libcuda.so.1, it lets torch and Triton take the paths that they take on a GPU of capability 9.0.
#define __CUDA_INCLUDE_COMPILER_INTERNAL_HEADERS__
#include <driver_types.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

long launches, waits, captured;
static void *capturing;  // the stream, while a graph is captured from it
static int spoilt;       // by what cannot be captured

#define DOES_NOTHING(name) int name() { return 0; }
#define MAKES_HANDLE(name) int name(void **handle) { *handle = malloc(64); return 0; }
#define GIVES_INT(name, value) int name(int *x) { *x = value; return 0; }
#define LAUNCHES(name) int name() { return capturing ? captured++ : launches++, 0; }
#define WAITS(name) int name() { return waits++, capturing ? spoilt = 900 : 0; }

// Devices
GIVES_INT(cudaGetDeviceCount, 1)
GIVES_INT(cudaGetDevice, 0)
GIVES_INT(cudaDriverGetVersion, 13000)
GIVES_INT(cudaRuntimeGetVersion, 13000)
GIVES_INT(cudaDeviceCanAccessPeer, 0)
GIVES_INT(cuDriverGetVersion, 13000)
GIVES_INT(cuDeviceGet, 0)
GIVES_INT(cuDeviceGetCount, 1)
DOES_NOTHING(cudaSetDevice)
DOES_NOTHING(cudaGetLastError)
DOES_NOTHING(cudaPeekAtLastError)
DOES_NOTHING(cudaFuncSetAttribute)
static int attribute(int *value, int which) {
    *value = which == cudaDevAttrComputeCapabilityMajor ? 9
             : which == cudaDevAttrComputeCapabilityMinor ? 0
             : which == cudaDevAttrMultiProcessorCount ? 132
             : which == cudaDevAttrWarpSize ? 32
             : which == cudaDevAttrMaxRegistersPerBlock ? 65536
             : which == cudaDevAttrMaxThreadsPerBlock ? 1024
             : which == cudaDevAttrMaxSharedMemoryPerBlock ? 49152
             : which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 232448 : 1;
    return 0;
}
int cudaDeviceGetAttribute(int *value, int which, int device) { return attribute(value, which); }
int cuDeviceGetAttribute(int *value, int which, int device) { return attribute(value, which); }
int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "no GPU");
    p->totalGlobalMem = 140ul << 30, p->major = 9, p->multiProcessorCount = 132, p->warpSize = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->maxThreadsPerMultiProcessor = 2048;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64, p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535, p->maxBlocksPerMultiProcessor = 32;
    p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472, p->l2CacheSize = 60 << 20;
    return 0;
}
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *active = 1, 0; }
int cuCtxGetCurrent(void **context) { return *context = (void *)1, 0; }

// Memory
int cudaMalloc(void **p, size_t n) {
    *p = mmap(0, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return 0;
}
DOES_NOTHING(cudaFree)
DOES_NOTHING(cudaMemset)
DOES_NOTHING(cudaMemsetAsync)
int cudaMemGetInfo(size_t *free, size_t *total) { return *free = *total = 140ul << 30, 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream) {
    if (kind == cudaMemcpyDeviceToDevice) return 0;
    return memcpy(to, from, n), capturing ? spoilt = 900 : 0;  // of memory that is not pinned
}
int cudaHostAlloc(void **p, size_t n, unsigned flags) { return *p = malloc(n), 0; }

// Streams and events
MAKES_HANDLE(cudaStreamCreateWithPriority)
MAKES_HANDLE(cudaEventCreateWithFlags)
MAKES_HANDLE(cudaEventCreate)
DOES_NOTHING(cudaEventDestroy)
DOES_NOTHING(cudaEventQuery)
DOES_NOTHING(cudaEventRecord)
DOES_NOTHING(cudaEventRecordWithFlags)
DOES_NOTHING(cudaStreamQuery)
DOES_NOTHING(cudaStreamWaitEvent)
WAITS(cudaStreamSynchronize)
WAITS(cudaEventSynchronize)
DOES_NOTHING(cudaDeviceSynchronize)
int cudaEventElapsedTime(float *ms, void *from, void *to) { return *ms = 1, 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *most) { return *least = 0, *most = -5, 0; }

// Graphs
int cudaStreamIsCapturing(void *stream, int *status) {
    return *status = stream && stream == capturing, 0;
}
int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id) {
    if (id) *id = 1;
    return cudaStreamIsCapturing(stream, status);
}
int cudaStreamBeginCapture(void *stream, int mode) { return capturing = stream, spoilt = 0; }
int cudaStreamEndCapture(void *stream, void **graph) {
    return capturing = 0, *graph = malloc(64), spoilt;
}
int cudaGraphGetNodes(void *graph, void *nodes, size_t *number) { return *number = captured, 0; }
MAKES_HANDLE(cudaGraphInstantiate)
MAKES_HANDLE(cudaGraphInstantiateWithFlags)
LAUNCHES(cudaGraphLaunch)
DOES_NOTHING(cudaGraphDestroy)
DOES_NOTHING(cudaGraphExecDestroy)
GIVES_INT(cudaThreadExchangeStreamCaptureMode, 0)

// Kernels
LAUNCHES(cudaLaunchKernel)
LAUNCHES(__cudaLaunchKernel)
LAUNCHES(cudaLaunchKernelExC)
LAUNCHES(cuLaunchKernel)
LAUNCHES(cuLaunchKernelEx)
DOES_NOTHING(cuModuleLoad)
DOES_NOTHING(cuModuleUnload)
DOES_NOTHING(__cudaPushCallConfiguration)
DOES_NOTHING(__cudaPopCallConfiguration)
int __cudaGetKernel(void **kernel, void *function) { return *kernel = function, 0; }
int cudaFuncGetAttributes(struct cudaFuncAttributes *a, void *function) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->ptxVersion = a->binaryVersion = 90;
    return 0;
}
int cuFuncGetAttribute(int *value, int which, void *function) {
    return *value = which == 4 ? 32 : which == 0 ? 1024 : 0, 0;  // registers, threads
}
GIVES_INT(cudaOccupancyMaxActiveBlocksPerMultiprocessor, 8)
GIVES_INT(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, 8)
int cudaGetDriverEntryPointByVersion(const char *name, void **function) {
    extern int found_by_name();
    *function = !strcmp(name, "cuDevicePrimaryCtxGetState") ? (void *)cuDevicePrimaryCtxGetState
                : !strcmp(name, "cuCtxGetCurrent") ? (void *)cuCtxGetCurrent : (void *)found_by_name;
    return 0;
}
DOES_NOTHING(found_by_name)

// Products
MAKES_HANDLE(cublasCreate_v2)
MAKES_HANDLE(cublasLtMatmulDescCreate)
MAKES_HANDLE(cublasLtMatmulPreferenceCreate)
MAKES_HANDLE(cublasLtMatrixLayoutCreate)
DOES_NOTHING(cublasSetStream_v2)
DOES_NOTHING(cublasSetWorkspace_v2)
DOES_NOTHING(cublasSetMathMode)
DOES_NOTHING(cublasLtMatmulDescSetAttribute)
DOES_NOTHING(cublasLtMatmulPreferenceSetAttribute)
DOES_NOTHING(cublasLtMatrixLayoutSetAttribute)
DOES_NOTHING(cublasLtMatmulDescDestroy)
DOES_NOTHING(cublasLtMatmulPreferenceDestroy)
DOES_NOTHING(cublasLtMatrixLayoutDestroy)
int cublasGetMathMode(void *handle, int *mode) { return *mode = 0, 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0, 0; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d,
                                   void *preference, int wanted, char *results, int *found) {
    return memset(results, 0, 64), *found = 1, 0;
}
LAUNCHES(cublasLtMatmul)
LAUNCHES(cublasGemmEx)
LAUNCHES(cublasSgemm_v2)
LAUNCHES(cublasSgemmEx)
LAUNCHES(cublasGemmStridedBatchedEx)
LAUNCHES(cublasSgemmStridedBatched)
