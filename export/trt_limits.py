"""What TensorRT refuses or runs slowly, operator by operator, each with where NVIDIA says so: the table of `trt_check`.

A row is a fact about operators; whether a node is concerned is decided by the row's condition (`trt_conditions`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from onnx import TensorProto

from cveff.export import trt_conditions as when

Severity = Literal["fails", "slow"]
"""fails: TensorRT refuses the file, or computes something else than it says; slow: it runs, and could run faster."""

OPERATORS = "onnx-tensorrt docs/operators.md, TensorRT 10.15"
QUANTIZATION = "TensorRT documentation, Working with Quantized Types: Explicit Quantization"
OPSETS_GUIDE = "TensorRT documentation, ONNX Opset Guide"
TYPING = "TensorRT documentation, Strongly Typed Networks"
SHAPES = "TensorRT documentation, Dynamic Shapes: execution tensors and shape tensors"
CAPTURE = "TensorRT documentation, CUDA Graphs: what cannot be captured"
DLA = "TensorRT documentation, DLA Supported Layers and Restrictions"
PLUGIN = "onnx-tensorrt issue 953, ScatterElements with a reduction"

EVERY = ""
"""As a row's operators: every operator."""

UNSUPPORTED = """
    AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress
    ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear ImageDecoder MatMulInteger MaxRoiPool MaxUnpool
    MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement QLinearConv
    QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength
    SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer StringSplit TfIdfVectorizer Unique
"""
UNLISTED = "BitCast CausalConvWithState CumProd LinearAttention SwiGLU Swish"
FLOATS_ONLY = """
    AveragePool BatchNormalization Ceil Clip Conv ConvTranspose CumSum Elu Erf Exp Floor Gemm GlobalAveragePool
    GlobalMaxPool GroupNormalization HardSigmoid HardSwish InstanceNormalization LayerNormalization LeakyRelu Log
    LogSoftmax MatMul MaxPool PRelu Reciprocal Resize RMSNormalization Round Sigmoid Softmax Softplus Sqrt Tanh
"""
NO_BFLOAT16 = "DeformConv GridSample Mish NonMaxSuppression NonZero RoiAlign STFT"
REDUCTIONS = """
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
"""
RESIZINGS = ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")
DLA_OPERATORS = """
    Abs Add AveragePool BatchNormalization Cast Clip Concat Constant Conv ConvTranspose DequantizeLinear Div Equal
    Flatten Gemm GlobalAveragePool GlobalMaxPool Greater Identity LRN LeakyRelu Less Max MaxPool Min Mul PRelu Pow
    QuantizeLinear ReduceMax Relu Reshape Resize Sigmoid Slice Softmax Split Squeeze Sub Tanh Transpose Unsqueeze
"""


@dataclass(frozen=True)
class Limit:
    """One fact.

    Attributes:
        rule: its name; several rows may share one.
        severity: what comes of it.
        operators: names of the ONNX operators it is about, with spaces between; `EVERY`: all.
        condition: says what is wrong with a node, or "".
        remedy: what to do.
        source: where it is documented.
        dla: whether it holds for the deep learning accelerator alone.
        names: `operators`, one by one.
    """

    rule: str
    severity: Severity
    operators: str
    condition: when.Condition
    remedy: str
    source: str = OPERATORS
    dla: bool = False
    names: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", frozenset(self.operators.split()))


def _dla(operators: str, condition: when.Condition, remedy: str) -> Limit:
    """The GPU takes what the accelerator does not: nothing fails."""
    return Limit("dla", "slow", operators, condition, remedy, DLA, dla=True)


# fmt: off
LIMITS = (
    # The parser and its types.
    Limit("unsupported", "fails", UNSUPPORTED, when.always("TensorRT's parser has no such operator"),
          "write it with others, or leave it to code outside the file"),
    Limit("unsupported", "fails", UNLISTED, when.always("is not among the operators that TensorRT's parser lists"),
          "export with opset=20, which writes it with older operators"),
    Limit("type", "fails", EVERY, when.unknown_types, "cast to a type that TensorRT has"),
    Limit("type", "fails", EVERY, when.unsigned_inside, "only inputs and outputs of the network have it: cast at once"),
    Limit("type", "fails", EVERY, when.of_types({TensorProto.DOUBLE}),
          "TensorRT computes in float32 and clamps what lies beyond: cast to float32"),
    Limit("type", "fails", FLOATS_ONLY, when.of_types(when.INTEGERS), "cast to floats before it"),
    Limit("type", "fails", NO_BFLOAT16, when.of_types({TensorProto.BFLOAT16}), "cast to float32 around it"),
    Limit("type", "fails", "STFT", when.of_types({TensorProto.FLOAT16}), "cast to float32 around it"),
    Limit("int64", "slow", EVERY, when.wide_integers,
          "computed in 64 bits, which plugins and DLA clamp to 32: keep indices and sizes below"),
    # Arguments that must be constants.
    Limit("argument", "fails", REDUCTIONS, when.computed(1), "make the axes constants"),
    Limit("argument", "fails", "CumSum OneHot Squeeze Unsqueeze", when.computed(1), "make it a constant"),
    Limit("argument", "fails", "STFT", when.computed(1, 2), "make it a constant"),
    Limit("argument", "fails", "Dropout", when.computed(2), "export the network in evaluation mode"),
    # Variants of operators.
    Limit("variant", "fails", "TopK", when.too_many(3840), "TensorRT takes less than 3840: split the axis"),
    Limit("variant", "fails", "TopK", when.other("sorted", 1), "set sorted to 1"),
    Limit("variant", "fails", "ScatterND", when.other("reduction", "none"),
          "TensorRT only overwrites: sum by a product with a one-hot matrix"),
    Limit("variant", "slow", "ScatterElements", when.other("reduction", "none"),
          "runs as a plugin, if the release has one: sum by a product with a one-hot matrix", PLUGIN),
    Limit("variant", "fails", "MaxPool", when.more_outputs(1), "TensorRT returns no indices of maxima"),
    Limit("variant", "fails", "AveragePool LpPool MaxPool", when.dilated, "pool without dilation"),
    Limit("variant", "fails", "Resize", when.other("mode", "nearest", "linear"), "resize by nearest or linear"),
    Limit("variant", "fails", "Resize", when.other("antialias", 0), "resize without antialiasing"),
    Limit("variant", "fails", "Resize", when.other("keep_aspect_ratio_policy", "stretch"), "give both sizes"),
    Limit("variant", "fails", "Resize", when.other("coordinate_transformation_mode", *RESIZINGS), "use half_pixel"),
    Limit("variant", "fails", "LayerNormalization", when.more_outputs(1), "use the first output alone"),
    Limit("variant", "fails", "LSTM", when.other("input_forget", 0), "use separate gates"),
    Limit("variant", "fails", "LSTM", when.other("layout", 0), "put time first"),
    Limit("variant", "fails", "GridSample", when.not_4d, "sample over two axes"),
    Limit("variant", "fails", "DeformConv", when.uneven_padding, "pad both ends of an axis alike"),
    Limit("variant", "fails", "Attention", when.not_4d, "give heads an axis of their own"),
    Limit("variant", "fails", "Attention", when.more_inputs(4), "attend without a cache"),
    Limit("variant", "fails", "Attention", when.more_outputs(1), "use the first output alone"),
    Limit("variant", "fails", "Attention", when.other("softcap", 0.0), "write attention with products and a softmax"),
    Limit("variant", "fails", "Constant", when.given("sparse_value", "value_string", "value_strings"),
          "use a dense tensor of numbers"),
    # Shapes and control flow.
    Limit("shape-from-values", "fails", "Reshape Expand Tile TopK Pad", when.sized_by_values(1),
          "compute sizes from shapes or constants", SHAPES),
    Limit("shape-from-values", "fails", "ConstantOfShape Range", when.sized_by_values(0, 1, 2),
          "compute sizes from shapes or constants", SHAPES),
    Limit("shape-from-values", "fails", "Slice", when.sized_by_values(1, 2, 4),
          "take a fixed number of values, with Gather", SHAPES),
    Limit("shape-from-values", "fails", "Resize", when.sized_by_values(2, 3), "resize to a fixed size", SHAPES),
    Limit("size-from-values", "slow", "NonMaxSuppression NonZero",
          when.always("how much it returns is known only when it ran: no CUDA graph, memory for the worst case"),
          "select with a mask, or do it outside the file", CAPTURE),
    Limit("control-flow", "slow", "If Loop Scan",
          when.always("nothing fuses across it, no CUDA graph holds it, and what is inside is not checked here"),
          "unroll it, or export a file for each branch", CAPTURE),
    # The deep learning accelerator.
    _dla(EVERY, when.not_among(DLA_OPERATORS), "the GPU runs it, and data goes there and back"),
    _dla(EVERY, when.long_axes(8192), "DLA has axes of up to 8192"),
    _dla("Conv", when.not_2d, "DLA convolves over two axes"),
    _dla("Conv", when.beyond(kernel_shape=32, strides=8), "DLA has kernels of up to 32 and strides of up to 8"),
    _dla("ConvTranspose", when.grouped_or_padded, "DLA has neither groups nor dilation nor padding here"),
    _dla("Concat", when.not_over_channels, "DLA concatenates channels alone"),
    _dla("Conv ConvTranspose Gemm", when.in_floats, "DLA computes in float16 and int8: quantize the model"),
)
# fmt: on

OTHER_RULES: Mapping[str, tuple[Severity, str]] = {
    "opset": ("fails", OPSETS_GUIDE),
    "types": ("fails", TYPING),
    "batch": ("fails", SHAPES),
    "zero-point": ("fails", OPERATORS),
    "zero-point-type": ("fails", OPERATORS),
    "scale": ("fails", QUANTIZATION),
    "granularity": ("fails", QUANTIZATION),
    "weight-axis": ("fails", QUANTIZATION),
    "integer-bias": ("fails", OPERATORS),
    "pair": ("fails", QUANTIZATION),
    "stranded": ("slow", QUANTIZATION),
    "one-sided": ("slow", QUANTIZATION),
    "double-rounding": ("slow", QUANTIZATION),
}
"""Severity and source of what takes more than a node to see: whole files (`trt_check`) and rounding (`trt_rules`)."""
