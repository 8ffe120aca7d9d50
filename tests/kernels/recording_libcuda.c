// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
//
// What Triton's launcher needs of a CUDA driver, without a device: takes every module and every launch, and shows the
// launches to an observer. Types are as in cuda.h; every function returns CUDA_SUCCESS.
#include <stdint.h>

typedef void (*Observer)(const void *config, uintptr_t function, void **params);
static Observer observer;
static uintptr_t functions;

void set_observer(Observer wanted) { observer = wanted; }

int cuLaunchKernelEx(const void *config, uintptr_t function, void **params, void **extra) {
  (void)extra;
  observer(config, function, params);
  return 0;
}

int cuModuleGetFunction(uintptr_t *function, uintptr_t module, const char *name) {
  (void)module, (void)name;
  *function = ++functions;  // each has a number of its own
  return 0;
}

int cuPointerGetAttribute(uint64_t *data, int attribute, uint64_t pointer) {
  (void)attribute;
  *data = pointer;
  return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  switch (attribute) {
  case 75: *value = 9; break;       // major compute capability
  case 10: *value = 32; break;      // threads of a warp
  case 97: *value = 232448; break;  // bytes of shared memory that a program can have
  default: *value = 0;
  }
  return 0;
}

int cuFuncGetAttribute(int *value, int attribute, uintptr_t function) {
  (void)function;
  *value = attribute == 0 ? 1024 : 0;  // threads of a program
  return 0;
}

int cuCtxGetCurrent(uintptr_t *context) {
  *context = 1;
  return 0;
}

int cuGetErrorString(int error, const char **text) {
  (void)error;
  *text = "an error of the recording driver";
  return 0;
}

// Linked, but without effect here or never called.
#define NOTHING(name) \
  int name(void) { return 0; }
NOTHING(cuInit)
NOTHING(cuCtxGetDevice)
NOTHING(cuCtxGetLimit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuDeviceGet)
NOTHING(cuDevicePrimaryCtxRetain)
NOTHING(cuDriverGetVersion)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuModuleLoadData)
NOTHING(cuModuleUnload)
NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuStreamIsCapturing)
NOTHING(cuTensorMapEncodeIm2col)
NOTHING(cuTensorMapEncodeTiled)
