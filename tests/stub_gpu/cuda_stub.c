/* A CUDA driver without a GPU: what Triton calls of libcuda, and streams and events, which answers as the driver
 * of one device or of several that are alike would, computes nothing, refuses what CUDA's documentation forbids,
 * and keeps a record of every map, launch and event, in the thread that called.
 *
 *   cc -shared -fPIC -Wl,-soname,libcuda.so.1 -I<triton>/backends/nvidia/include -o libcuda.so.1 cuda_stub.c
 *
 * A record is one line of JSON: {"call": "map", "launch", "record", "wait" or "synchronize", "order": its number
 * among those of all threads, …, "faults": [what is wrong with it, in words]}. A faulty call returns an error, as
 * it would on a GPU. The rules of maps are those of cuTensorMapEncodeTiled in the CUDA driver API, those of launches
 * the limits of the CUDA programming guide, those of contexts what the driver API says of each handle: it serves
 * in the context that it was made in, except that any stream may wait for an event.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MOST_PARAMETERS 256
#define MAP_MAGIC "STUBTMAP"

#define MOST_DEVICES 16

typedef struct Function Function;

typedef struct Stream {
    int device;
    const Function *last; /* that was launched on it */
    struct Stream *next;
} Stream;

/* The primary context of a device: there is no other. */
typedef struct {
    int device;
    Stream null;
} Context;

typedef struct {
    Context *context;
} Module;

struct Function {
    Context *context;
    char *name;
    int dynamic_shared_memory; /* bytes that the function may have: 48 KB until it asks for more */
    int triggers;              /* whether it lets a dependent launch start early */
    int parameters;            /* -1: not known */
    int sizes[MOST_PARAMETERS];
};

typedef struct {
    Context *context;
    unsigned number;
    long long recorded; /* order of its last record, -1: none */
} Event;

/* The devices: stub_device sets what they are, stub_devices how many. */
static int devices = 1;
static Context contexts[MOST_DEVICES];
static Stream *streams;
static __thread Context *current;
static int major = 9, minor = 0, multiprocessors = 132, shared_optin = 232448, shared_per_sm = 233472;

/* Neither records nor checks: for the time of what leads to a launch. */
static int quiet;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread char *records;
static __thread size_t used, room;
static uint32_t maps;
static unsigned events;
static long long order;
static long long launched; /* launches, also while it is quiet */

static void append(const char *format, ...) {
    va_list args;
    va_start(args, format);
    char text[4096];
    int length = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (used + (size_t)length + 1 > room) {
        room = 2 * (used + (size_t)length + 1) + 65536;
        records = realloc(records, room);
        if (!records) abort();
    }
    memcpy(records + used, text, (size_t)length + 1);
    used += (size_t)length;
}

/* Faults of the call at work. */
static char faults[2048];

static void fault(const char *format, ...) {
    size_t length = strlen(faults);
    va_list args;
    va_start(args, format);
    if (length) length += (size_t)snprintf(faults + length, sizeof faults - length, "\", \"");
    if (length < sizeof faults) vsnprintf(faults + length, sizeof faults - length, format, args);
    va_end(args);
}

/* Copy `size` bytes from an address that may lead anywhere; 0 if it cannot be read. */
static int copy_from(void *to, const void *from, size_t size) {
    static int ends[2] = {-1, -1};
    if (ends[0] < 0 && pipe(ends)) abort();
    return from && write(ends[1], from, size) == (ssize_t)size && read(ends[0], to, size) == (ssize_t)size;
}

static CUresult finish(CUresult error) {
    CUresult result = faults[0] ? error : CUDA_SUCCESS;
    if (faults[0]) append(", \"faults\": [\"%s\"]}\n", faults);
    else append(", \"faults\": []}\n");
    return result;
}

/* The stream of a handle in the current context, NULL with a fault. Both 0 and CU_STREAM_LEGACY are the default. */
static Stream *stream_of(CUstream handle) {
    if (handle == NULL || handle == CU_STREAM_LEGACY) return current ? &current->null : NULL;
    for (Stream *stream = streams; stream; stream = stream->next)
        if (stream == (Stream *)handle) return stream;
    fault("stream %llu is none", (unsigned long long)(uintptr_t)handle);
    return NULL;
}

static CUstream handle_of(const Stream *stream) {
    for (int i = 0; i < MOST_DEVICES; i++)
        if (stream == &contexts[i].null) return NULL;
    return (CUstream)stream;
}

static void describe_stream(const Stream *stream) {
    append(", \"order\": %lld, \"stream\": %llu, \"device\": %d", order++,
           (unsigned long long)(uintptr_t)(stream ? handle_of(stream) : NULL),
           stream ? stream->device : current ? current->device : -1);
}

/* For Python. */

void stub_device(int cc_major, int cc_minor, int sms, int optin, int per_sm) {
    major = cc_major;
    minor = cc_minor;
    multiprocessors = sms;
    shared_optin = optin;
    shared_per_sm = per_sm;
}

void stub_devices(int count) { devices = count < MOST_DEVICES ? count : MOST_DEVICES; }

void stub_quiet(int wanted) { quiet = wanted; }

long long stub_launched(void) { return __atomic_load_n(&launched, __ATOMIC_RELAXED); }

/* A number between those of the records before and after. */
long long stub_order(void) {
    pthread_mutex_lock(&lock);
    long long now = order++;
    pthread_mutex_unlock(&lock);
    return now;
}

/* What a function's PTX says: the sizes in bytes of its parameters, and whether it has launch_dependents. */
void stub_declare(CUfunction handle, int count, const int *sizes, int triggers) {
    Function *function = (Function *)handle;
    function->triggers = triggers;
    function->parameters = count < MOST_PARAMETERS ? count : MOST_PARAMETERS;
    memcpy(function->sizes, sizes, sizeof(int) * (size_t)function->parameters);
}

/* This thread's records since its last call, to be handed to stub_free. */
char *stub_take(void) {
    char *taken = records ? records : calloc(1, 1);
    records = NULL;
    used = room = 0;
    return taken;
}

void stub_free(char *taken) { free(taken); }

/* The driver. */

CUresult cuInit(unsigned int flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = devices; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    if (ordinal < 0 || ordinal >= devices) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    switch (error) {
    case CUDA_ERROR_INVALID_VALUE: *text = "invalid argument"; break;
    case CUDA_ERROR_INVALID_DEVICE: *text = "invalid device ordinal"; break;
    case CUDA_ERROR_INVALID_CONTEXT: *text = "invalid device context"; break;
    case CUDA_ERROR_INVALID_HANDLE: *text = "invalid resource handle"; break;
    default: *text = "an error of the stub driver";
    }
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_optin; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_per_sm; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 49152; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = multiprocessors; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = major; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = minor; break;
    default: *value = 1;
    }
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)current; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { current = (Context *)context; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) {
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    *device = current->device;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    if (device < 0 || device >= devices) return CUDA_ERROR_INVALID_DEVICE;
    contexts[device].device = contexts[device].null.device = device;
    *context = (CUcontext)&contexts[device];
    return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream *handle, unsigned flags) {
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    Stream *stream = calloc(1, sizeof *stream);
    stream->device = current->device;
    pthread_mutex_lock(&lock);
    stream->next = streams;
    streams = stream;
    pthread_mutex_unlock(&lock);
    *handle = (CUstream)stream;
    return CUDA_SUCCESS;
}

CUresult cuEventCreate(CUevent *handle, unsigned flags) {
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    Event *event = calloc(1, sizeof *event);
    event->context = current;
    event->recorded = -1;
    pthread_mutex_lock(&lock);
    event->number = events++;
    pthread_mutex_unlock(&lock);
    *handle = (CUevent)event;
    return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent handle, CUstream of) {
    if (quiet) return CUDA_SUCCESS;
    Event *event = (Event *)handle;
    pthread_mutex_lock(&lock);
    faults[0] = 0;
    if (!current) fault("no context is current");
    const Stream *stream = stream_of(of);
    event->recorded = order;
    append("{\"call\": \"record\", \"event\": %u", event->number);
    describe_stream(stream);
    if (stream && event->context->device != stream->device)
        fault("an event of device %d on a stream of device %d", event->context->device, stream->device);
    CUresult result = finish(CUDA_ERROR_INVALID_HANDLE);
    pthread_mutex_unlock(&lock);
    return result;
}

/* of: the order of what is waited for, -1 if the event was not recorded, which is to wait for nothing. */
CUresult cuStreamWaitEvent(CUstream by, CUevent handle, unsigned flags) {
    if (quiet) return CUDA_SUCCESS;
    const Event *event = (const Event *)handle;
    pthread_mutex_lock(&lock);
    faults[0] = 0;
    if (!current) fault("no context is current");
    append("{\"call\": \"wait\", \"event\": %u, \"of\": %lld", event->number, event->recorded);
    describe_stream(stream_of(by));
    CUresult result = finish(CUDA_ERROR_INVALID_HANDLE);
    pthread_mutex_unlock(&lock);
    return result;
}

/* what: "stream", "event" or "device". */
static CUresult synchronize(const char *what, CUstream handle, long long of) {
    if (quiet) return CUDA_SUCCESS;
    pthread_mutex_lock(&lock);
    faults[0] = 0;
    if (!current) fault("no context is current");
    append("{\"call\": \"synchronize\", \"what\": \"%s\", \"of\": %lld", what, of);
    describe_stream(stream_of(handle));
    CUresult result = finish(CUDA_ERROR_INVALID_HANDLE);
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult cuStreamSynchronize(CUstream stream) { return synchronize("stream", stream, -1); }
CUresult cuEventSynchronize(CUevent event) { return synchronize("event", NULL, ((Event *)event)->recorded); }
CUresult cuCtxSynchronize(void) { return synchronize("device", NULL, -1); }

/* Any address is one of the device: tensors lie in the host's memory here. */
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    *(CUdeviceptr *)data = pointer;
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    Module *loaded = calloc(1, sizeof *loaded);
    loaded->context = current;
    *module = (CUmodule)loaded;
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *handle, CUmodule module, const char *name) {
    if (!module) return CUDA_ERROR_INVALID_HANDLE;
    Function *function = calloc(1, sizeof *function);
    function->context = ((Module *)module)->context;
    function->name = strdup(name);
    function->dynamic_shared_memory = 49152;
    function->parameters = -1;
    *handle = (CUfunction)function;
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        if (value > shared_optin) return CUDA_ERROR_INVALID_VALUE;
        ((Function *)handle)->dynamic_shared_memory = value;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
    *clusters = multiprocessors;
    return CUDA_SUCCESS;
}

static int element_size(CUtensorMapDataType type) {
    switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ: return 4;
    default: return 0;
    }
}

static void list64(const char *name, const cuuint64_t *values, unsigned count) {
    append(", \"%s\": [", name);
    for (unsigned i = 0; i < count; i++) append("%s%llu", i ? ", " : "", (unsigned long long)values[i]);
    append("]");
}

static void list32(const char *name, const cuuint32_t *values, unsigned count) {
    append(", \"%s\": [", name);
    for (unsigned i = 0; i < count; i++) append("%s%u", i ? ", " : "", values[i]);
    append("]");
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
    if (quiet) return CUDA_SUCCESS;
    pthread_mutex_lock(&lock);
    faults[0] = 0;
    int size = element_size(type);
    unsigned shown = rank <= 5 ? rank : 0;
    unsigned long long span = swizzle == CU_TENSOR_MAP_SWIZZLE_32B   ? 32
                              : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                              : swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0
                                                                      : 128;
    append("{\"call\": \"map\", \"order\": %lld, \"id\": %u, \"type\": %d, \"element_size\": %d, \"address\": %llu",
           order++, maps, type, size, (unsigned long long)(uintptr_t)address);
    list64("dims", dims, shown);
    list64("strides", strides, shown ? shown - 1 : 0);
    list32("box", box, shown);
    list32("steps", steps, shown);
    append(", \"swizzle\": %llu, \"promotion\": %d, \"nan_fill\": %d", span, promotion, fill);

    if (major < 9) fault("a tensor map on sm_%d%d, which has no TMA", major, minor);
    if ((uintptr_t)map % 64) fault("the map lies at no multiple of 64 bytes");
    if (!size) fault("data type %d", type);
    if (rank < 1 || rank > 5) fault("rank %u, not 1 to 5", rank);
    if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) fault("interleave %d", interleave);
    if ((uintptr_t)address % 16) fault("address %llu is no multiple of 16", (unsigned long long)(uintptr_t)address);
    for (unsigned i = 0; i < shown; i++) {
        if (dims[i] == 0 || dims[i] > 1ull << 32)
            fault("dimension %u is %llu, not 1 to 2**32", i, (unsigned long long)dims[i]);
        if (box[i] == 0 || box[i] > 256) fault("box[%u] is %u, not 1 to 256", i, box[i]);
        if (steps[i] == 0 || steps[i] > 8) fault("element stride %u is %u, not 1 to 8", i, steps[i]);
    }
    for (unsigned i = 0; i + 1 < shown; i++) {
        unsigned long long stride = strides[i];
        if (stride % 16) fault("stride %llu is no multiple of 16 bytes", stride);
        if (stride >= 1ull << 40) fault("stride %llu is not below 2**40 bytes", stride);
        if (i == 0 && stride < dims[0] * (unsigned)size)
            fault("stride %llu is less than a row of %llu elements", stride, (unsigned long long)dims[0]);
        if (i && strides[i - 1] && stride % strides[i - 1]) fault("stride %u is no multiple of the one before", i);
    }
    if (shown && box[0] * (unsigned)size % 16) fault("%u bytes of the inner box, no multiple of 16", box[0] * size);
    if (shown && span && box[0] * (unsigned)size > span)
        fault("%u bytes of the inner box in a swizzle of %llu", box[0] * size, span);
    if (fill && size && type != CU_TENSOR_MAP_DATA_TYPE_FLOAT16 && type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 &&
        type < CU_TENSOR_MAP_DATA_TYPE_FLOAT32)
        fault("NaN as the fill of integers");

    /* What a launch passes on is recognised by this. */
    memset(map, 0, sizeof *map);
    memcpy(map, MAP_MAGIC, 8);
    memcpy((char *)map + 8, &maps, sizeof maps);
    maps++;
    CUresult result = finish(CUDA_ERROR_INVALID_VALUE);
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction handle, void **parameters, void **extra) {
    __atomic_fetch_add(&launched, 1, __ATOMIC_RELAXED);
    if (quiet) return CUDA_SUCCESS;
    const Function *function = (const Function *)handle;
    pthread_mutex_lock(&lock);
    faults[0] = 0;
    int dependent = 0, cooperative = 0, spread = 0;
    unsigned cluster[3] = {1, 1, 1};
    for (unsigned i = 0; i < config->numAttrs; i++) {
        const CUlaunchAttribute *attribute = &config->attrs[i];
        switch (attribute->id) {
        case CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION:
            dependent = attribute->value.programmaticStreamSerializationAllowed != 0;
            break;
        case CU_LAUNCH_ATTRIBUTE_COOPERATIVE: cooperative = attribute->value.cooperative != 0; break;
        case CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION:
            cluster[0] = attribute->value.clusterDim.x;
            cluster[1] = attribute->value.clusterDim.y;
            cluster[2] = attribute->value.clusterDim.z;
            break;
        case CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE: spread = 1; break;
        default: fault("launch attribute %d", attribute->id);
        }
    }
    const unsigned grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
    const unsigned block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
    const unsigned most_blocks[3] = {2147483647u, 65535, 65535}, most_threads[3] = {1024, 1024, 64};
    append("{\"call\": \"launch\", \"kernel\": \"%s\"", function->name);
    if (!current) fault("no context is current");
    Stream *stream = stream_of(config->hStream);
    describe_stream(stream);
    int device = current ? current->device : -1, on = stream ? stream->device : device;
    if (function->context->device != device)
        fault("a function of device %d, launched while device %d is current", function->context->device, device);
    if (on != device) fault("on a stream of device %d, while device %d is current", on, device);
    append(", \"before\": \"%s\", \"before_triggers\": %s", stream && stream->last ? stream->last->name : "",
           stream && stream->last && stream->last->triggers ? "true" : "false");
    if (stream) stream->last = function;
    list32("grid", grid, 3);
    list32("block", block, 3);
    list32("cluster", cluster, 3);
    append(", \"shared_memory\": %u, \"dependent\": %s, \"cooperative\": %s, \"spread\": %d", config->sharedMemBytes,
           dependent ? "true" : "false", cooperative ? "true" : "false", spread);
    for (int i = 0; i < 3; i++) {
        if (grid[i] < 1 || grid[i] > most_blocks[i]) fault("grid[%d] is %u, not 1 to %u", i, grid[i], most_blocks[i]);
        if (block[i] < 1 || block[i] > most_threads[i])
            fault("block[%d] is %u, not 1 to %u", i, block[i], most_threads[i]);
        if (cluster[i] < 1 || grid[i] % (cluster[i] ? cluster[i] : 1))
            fault("grid[%d] is %u, no multiple of the cluster's %u", i, grid[i], cluster[i]);
    }
    if ((unsigned long long)block[0] * block[1] * block[2] > 1024)
        fault("%u threads in a block", block[0] * block[1] * block[2]);
    unsigned of_cluster = cluster[0] * cluster[1] * cluster[2];
    if (of_cluster > 8) fault("a cluster of %u blocks, more than the 8 that every device has", of_cluster);
    if (of_cluster > 1 && major < 9) fault("a cluster on sm_%d%d", major, minor);
    if (dependent && major < 9) fault("a dependent launch on sm_%d%d", major, minor);
    if (config->sharedMemBytes > (unsigned)shared_optin)
        fault("%u bytes of shared memory, the device has %d", config->sharedMemBytes, shared_optin);
    else if (config->sharedMemBytes > (unsigned)function->dynamic_shared_memory)
        fault("%u bytes of shared memory, the function asked for %d", config->sharedMemBytes,
              function->dynamic_shared_memory);

    /* Read as the driver would, so many bytes behind each pointer; a pointer beyond the launcher's list may
     * lead anywhere. */
    append(", \"parameters\": [");
    for (int i = 0; i < function->parameters; i++) {
        unsigned char bytes[256];
        size_t size = (size_t)function->sizes[i] < sizeof bytes ? (size_t)function->sizes[i] : sizeof bytes;
        append("%s", i ? ", " : "");
        if (!copy_from(bytes, parameters[i], size)) {
            append("null");
            continue;
        }
        append("\"");
        for (size_t j = 0; j < size; j++) append("%02x", bytes[j]);
        append("\"");
    }
    append("]");
    CUresult result = finish(CUDA_ERROR_INVALID_VALUE);
    pthread_mutex_unlock(&lock);
    return result;
}
