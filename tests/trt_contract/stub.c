/* The C entry points that the Python bindings of TensorRT resolve when they are imported. Each returns zero: with them
 * the bindings' classes can be inspected where the libraries are not installed, and nothing can be built or run. */
#define STUB(name) void *name(void) { return 0; }
STUB(createInferBuilder_INTERNAL)
STUB(createInferRefitter_INTERNAL)
STUB(createInferRuntime_INTERNAL)
STUB(createNvOnnxParser_INTERNAL)
STUB(createNvOnnxParserRefitter_INTERNAL)
STUB(getBuilderPluginRegistry)
STUB(getNvOnnxParserVersion)
STUB(getPluginRegistry)
STUB(initLibNvInferPlugins)
