"""A module that stands in for `tensorrt`: every name and argument comes from `api.json`, and what it is given is recorded.

Its engines run the very ONNX file that they were built from, in ONNX Runtime on the CPU, on the addresses that they are given.
What isn't in the list is an AttributeError or a TypeError, as it would be in the real bindings.
"""

import ctypes
import enum
import inspect
import json
import re
import types
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

API = json.loads((Path(__file__).parent / "api.json").read_text())
ONNX_DTYPES = {"FLOAT": 1, "HALF": 10, "BF16": 16, "INT32": 6, "INT64": 7, "BOOL": 9}
NAMES = {number: name for name, number in ONNX_DTYPES.items()}
NUMPY = {1: np.float32, 10: np.float16, 6: np.int32, 7: np.int64, 9: np.bool_}
WIDE = {16: 1}
"""What runs in the place of bfloat16, which ONNX Runtime has hardly a kernel for: float32, of the same weights."""
SPELLED = {1: "Float", 10: "Half", 16: "BFloat16", 3: "Int8", 17: "FP8"}
PRODUCTS = {"Conv", "Gemm", "MatMul"}


class Simulation:
    """What the stand-in has seen, and how it is to behave."""

    def __init__(self):
        self.calls = []
        """(class, method, arguments) in order."""
        self.refused = set()
        """Operators that the parser doesn't take."""
        self.build_fails_at = None
        self.build_says = "could not find any implementation for node {node}"
        """A node that the builder names as it gives up."""
        self.interrupt_after = None
        """Steps after which the test interrupts the build."""
        self.on_step = None
        self.other_precision = {}
        """Node -> dtype in which the engine runs it after all."""
        self.streamable = 0
        self.budget_step = 1
        """Weights stay on the device in pieces of so many bytes."""
        self.check_memory = lambda memory: None
        """Says whether address and bytes are memory that a run may use."""
        self.extra_missing = []
        """Weights that the refitter wants along with others."""
        self.refit_fails_after = None
        """Weights after which an exchange fails."""
        self.released = []
        """Memory that isn't the engine's any more; kept, so that reading it finds rubbish every time."""
        self.profiles_fail = False
        """Whether contexts can't be put in another profile."""
        self.lost_timings = False
        """Whether timing caches are those of another machine."""
        self.capturing = None
        """A list while a graph is captured: what is launched is put there instead of being run."""

    def see(self, kind, method, arguments):
        """Record a call; of the module's own objects the class alone, since what is recorded lives on."""
        plain = {name: type(each).__name__ if hasattr(each, "_body") else each for name, each in arguments.items()}
        self.calls.append((kind, method, plain))

    def named(self, name):
        return [arguments for _, method, arguments in self.calls if method == name]


def make(simulation):
    """Return the module."""
    module = types.ModuleType("tensorrt")
    module.__version__ = API["version"]
    for name, members in API["enums"].items():
        if "." not in name:
            setattr(module, name, enum.Enum(name, {member: index for index, member in enumerate(members)}))
    bodies = {each.__name__: each for each in (Builder, Config, Network, Parser, ParserError, Profile, TimingCache)}
    bodies |= {each.__name__: each for each in (Runtime, Engine, Context, Inspector, Refitter, ParserRefitter, Weights)}
    by_name = {
        "IBuilderConfig": "Config",
        "INetworkDefinition": "Network",
        "OnnxParser": "Parser",
        "OnnxParserRefitter": "ParserRefitter",
        "IOptimizationProfile": "Profile",
        "ITimingCache": "TimingCache",
        "ICudaEngine": "Engine",
        "IExecutionContext": "Context",
        "EngineInspector": "Inspector",
    }
    for name, listed in API["classes"].items():
        body = bodies.get(by_name.get(name, name), object)
        setattr(module, name, generate(name, listed, body, simulation, module))
    module.IHostMemory = type("IHostMemory", (bytes,), {"nbytes": property(len)})  # a buffer, as the real one
    module.ILogger.Severity = enum.Enum("Severity", {m: i for i, m in enumerate(API["enums"]["ILogger.Severity"])})
    module.get_nv_onnx_parser_version = lambda: 110400
    return module


def generate(name, listed, body, simulation, module):
    """Return a class with the listed methods and attributes alone; `body` says what they do."""

    def start(self, *args, **kwargs):
        if "__init__" not in listed["methods"]:
            message = f"{name}: No constructor defined!"
            raise TypeError(message)
        given = bind(name, "__init__", listed["methods"]["__init__"], args, kwargs)
        simulation.see(name, "__init__", given)
        object.__setattr__(self, "_own", {})
        object.__setattr__(self, "_body", None)
        if body is not object:
            object.__setattr__(self, "_body", body(simulation, module, **given))

    def assign(self, key, value):
        if type(self) is not made:  # a class of Python's own may have what it likes
            object.__setattr__(self, key, value)
        elif listed["attributes"].get(key) != "rw":
            message = f"{name} has no attribute {key!r} that can be set"
            raise AttributeError(message)
        else:
            simulation.see(name, key, {"value": value})
            setattr(self._body, key, value)

    members = {"__init__": start, "__setattr__": assign}
    for method, overloads in listed["methods"].items():
        if method != "__init__":
            members[method] = function(name, method, overloads, simulation)
    for attribute in listed["attributes"]:
        members[attribute] = property(lambda self, attribute=attribute: getattr(self._body, attribute))
    made = type(name, (), members)
    return made


def function(name, method, overloads, simulation):
    def call(self, *args, **kwargs):
        given = bind(name, method, overloads, args, kwargs)
        simulation.see(name, method, given)
        return getattr(self._body, method)(**given)

    return call


def bind(name, method, overloads, args, kwargs):
    """Return the arguments by name, of the first signature that takes them."""
    for arguments in overloads:
        parameters = [
            inspect.Parameter(
                each.removesuffix("="),
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=None if each.endswith("=") else inspect.Parameter.empty,
            )
            for each in arguments
        ]
        try:
            return dict(inspect.Signature(parameters).bind(*args, **kwargs).arguments)
        except TypeError:
            continue
    message = f"{name}.{method}(): incompatible arguments {args} {kwargs}, known: {overloads}"
    raise TypeError(message)


def wrap(module, name, body):
    """Return an object of a generated class that Python code can't make itself."""
    kind = getattr(module, name)
    made = object.__new__(kind)
    object.__setattr__(made, "_body", body)
    return made


class Body:
    def __init__(self, simulation, module, **_):
        self.simulation, self.module = simulation, module


class Builder(Body):
    def __init__(self, simulation, module, logger):
        super().__init__(simulation, module)
        self.logger = logger

    def create_network(self, flags=0):
        return wrap(self.module, "INetworkDefinition", Network(self.simulation, self.module))

    def create_builder_config(self):
        return wrap(self.module, "IBuilderConfig", Config(self.simulation, self.module))

    def create_optimization_profile(self):
        return wrap(self.module, "IOptimizationProfile", Profile(self.simulation, self.module))

    def build_serialized_network(self, network, config):
        settings, monitor = config._body, config._body.progress_monitor
        monitor.phase_start("Building Engine", "", 3)
        for step in range(3):
            if self.simulation.on_step:
                self.simulation.on_step(step)
            if not monitor.step_complete("Building Engine", step):
                return None
        monitor.phase_finish("Building Engine")
        if self.simulation.build_fails_at:
            said = f"Error Code 10: {self.simulation.build_says.format(node=self.simulation.build_fails_at)}"
            self.logger.log(self.module.ILogger.Severity.ERROR, said)
            return None
        settings.timed = b"timings"
        flags = sorted(flag.name for flag in settings.set)
        profiles = [profile._body.shapes for profile in settings.profiles]
        model = onnx.load(network._body.file)
        names = [t.name for t in model.graph.initializer if t.data_type in {1, 10, 16}]
        if "STRIP_PLAN" in flags:
            for tensor in model.graph.initializer:
                if tensor.name in names:
                    tensor.raw_data = bytes(len(tensor.raw_data))
        about = {"flags": flags, "profiles": profiles, "verbosity": settings.profiling_verbosity.name}
        head = json.dumps({**about, "previews": sorted(settings.previews)})
        return self.module.IHostMemory(head.encode() + b"\n" + model.SerializeToString())


class Config(Body):
    def __init__(self, simulation, module):
        super().__init__(simulation, module)
        self.set = {module.BuilderFlag.TF32}  # as in the real one, TF32 is on unless it is cleared
        self.profiles, self.limits = [], {}
        self.previews = set()
        self.profiling_verbosity = module.ProfilingVerbosity.LAYER_NAMES_ONLY
        self.builder_optimization_level = 3
        self.hardware_compatibility_level = module.HardwareCompatibilityLevel.NONE
        self.progress_monitor = None
        self.cache, self.timed = None, None

    def set_flag(self, flag):
        self.set.add(self.module.BuilderFlag(flag))

    def clear_flag(self, flag):
        self.set.discard(self.module.BuilderFlag(flag))

    def set_preview_feature(self, feature, enable):
        assert enable
        self.previews.add(self.module.PreviewFeature(feature).name)

    def set_memory_pool_limit(self, pool, pool_size):
        self.limits[self.module.MemoryPoolType(pool)] = pool_size

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache):
        body = TimingCache(self.simulation, self.module)
        body.data = bytes(serialized_timing_cache)
        return wrap(self.module, "ITimingCache", body)

    def set_timing_cache(self, cache, ignore_mismatch):
        if self.simulation.lost_timings and cache._body.data:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self):
        self.cache._body.data = self.timed or self.cache._body.data
        return self.cache


class TimingCache(Body):
    data = b""

    def serialize(self):
        return self.module.IHostMemory(self.data)


class Network(Body):
    file = None


class Profile(Body):
    def __init__(self, simulation, module):
        super().__init__(simulation, module)
        self.shapes = {}

    def set_shape(self, input, min, opt, max):  # noqa: A002 - the bindings' names
        if not all(low <= best <= high for low, best, high in zip(min, opt, max, strict=True)):
            message = f"Shape provided for min is inconsistent with other shapes: {input}"
            raise RuntimeError(message)
        self.shapes[input] = [list(min), list(opt), list(max)]


class Parser(Body):
    def __init__(self, simulation, module, network, logger):
        super().__init__(simulation, module)
        self.network, self.errors = network, []

    def parse_from_file(self, model):
        graph = onnx.load(model, load_external_data=False).graph
        self.errors = [node for node in graph.node if node.op_type in self.simulation.refused]
        self.network._body.file = model
        return not self.errors

    @property
    def num_errors(self):
        return len(self.errors)

    def get_error(self, index):
        return wrap(self.module, "ParserError", ParserError(self.simulation, self.module, node=self.errors[index]))


class ParserError(Body):
    def __init__(self, simulation, module, node):
        super().__init__(simulation, module)
        self.found = node

    def node_name(self):
        return self.found.name

    def node_operator(self):
        return self.found.op_type

    def desc(self):
        return "no importer for this operator"


class Runtime(Body):
    engine_host_code_allowed = False

    def __init__(self, simulation, module, logger):
        super().__init__(simulation, module)
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        head, _, model = bytes(serialized_engine).partition(b"\n")
        about = json.loads(head)
        if "VERSION_COMPATIBLE" in about["flags"] and not self.engine_host_code_allowed:
            return None
        return wrap(self.module, "ICudaEngine", Engine(self.simulation, self.module, about, model))


class Engine(Body):
    def __init__(self, simulation, module, about, model):
        super().__init__(simulation, module)
        self.about, self.model = about, onnx.load_from_string(model)
        self.budget = None
        self.contexts = weakref.WeakSet()
        self.version = 0
        """Goes up whenever weights are exchanged."""
        self.tensors = {v.name: v for v in (*self.model.graph.input, *self.model.graph.output)}
        self.inputs = {v.name for v in self.model.graph.input}

    num_io_tensors = property(lambda self: len(self.tensors))
    num_optimization_profiles = property(lambda self: max(1, len(self.about["profiles"])))
    refittable = property(lambda self: bool({"REFIT", "REFIT_IDENTICAL"} & set(self.about["flags"])))

    @property
    def weight_streaming_scratch_memory_size(self):
        return 128 if self.budget is not None and self.budget < self.simulation.streamable else 0

    @property
    def streamable_weights_size(self):
        assert "WEIGHT_STREAMING" in self.about["flags"]
        return self.simulation.streamable

    @property
    def weight_streaming_budget_v2(self):
        return self.budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, value):
        if not self.contexts:  # as the real one, it says nothing
            self.budget = value - value % self.simulation.budget_step

    @property
    def device_memory_size_v2(self):
        most = max(map(self.get_device_memory_size_for_profile_v2, range(self.num_optimization_profiles)))
        return most + self.weight_streaming_scratch_memory_size

    def get_device_memory_size_for_profile_v2(self, profile_index):
        profiles = self.about["profiles"]
        return activation_bytes(each[2] for each in profiles[profile_index].values()) if profiles else 4096

    def get_engine_stat(self, stat=None):
        return sum(len(t.raw_data) for t in self.model.graph.initializer)

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_mode(self, name):
        return self.module.TensorIOMode.INPUT if name in self.inputs else self.module.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return self.module.DataType[NAMES[self.tensors[name].type.tensor_type.elem_type]]

    def get_tensor_location(self, name):
        return self.module.TensorLocation.DEVICE

    def get_tensor_shape(self, name):
        dims = self.tensors[name].type.tensor_type.shape.dim
        return tuple(dim.dim_value or -1 for dim in dims)

    def get_tensor_profile_shape(self, name, profile_index):
        return self.about["profiles"][profile_index][name]

    def create_execution_context(self, strategy=None):
        assert self.budget is not None or "WEIGHT_STREAMING" not in self.about["flags"]  # or all weights would come
        made = Context(self.simulation, self.module, self, strategy)
        self.contexts.add(made)
        return wrap(self.module, "IExecutionContext", made)

    def create_engine_inspector(self):
        return wrap(self.module, "EngineInspector", Inspector(self.simulation, self.module, self))


def sized(name, found):
    """Return the size of a dimension that the graph calls `height`, `4_height` or `height_over_2`."""
    times, plain, over = re.fullmatch(r"(?:(\d+)_)?(\w+?)(?:_over_(\d+))?", name).groups()
    return int(times or 1) * found[plain] // int(over or 1)


def activation_bytes(shapes):
    """Return the device memory that a run takes besides weights: with the shapes of its inputs."""
    return 4096 + 4 * sum(int(np.prod(shape)) for shape in shapes)


def widened(model):
    """Return a model that computes in float32 what this one does in bfloat16."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        if tensor.data_type in WIDE:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for value in (*made.graph.input, *made.graph.output, *made.graph.value_info):
        kind = value.type.tensor_type
        kind.elem_type = WIDE.get(kind.elem_type, kind.elem_type)
    for node in made.graph.node:
        for attribute in node.attribute:
            if attribute.name in {"to", "output_dtype"}:
                attribute.i = WIDE.get(attribute.i, attribute.i)
            elif attribute.HasField("t") and attribute.t.data_type in WIDE:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float32)))
    return made


class Context(Body):
    def __init__(self, simulation, module, engine, strategy):
        super().__init__(simulation, module)
        self.engine_body, self.strategy, self.profile = engine, strategy, 0
        self.shapes, self.addresses, self.memory = {}, {}, (0, 0)
        self.session, self.version, self.needs = None, None, None
        self.reshaped = 0
        """How often a shape became another."""

    def set_optimization_profile_async(self, profile_index, stream_handle):
        if profile_index >= self.engine_body.num_optimization_profiles or self.simulation.profiles_fail:
            message = "Error in set optimization profile async."
            raise RuntimeError(message)
        self.profile = profile_index
        return True

    def set_input_shape(self, name, shape):
        least, _, most = self.engine_body.about["profiles"][self.profile][name]
        if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
            return False
        self.reshaped += self.shapes.get(name) != tuple(shape)
        self.shapes[name], self.needs = tuple(shape), None
        return True

    def update_device_memory_size_for_shapes(self):
        assert not self.infer_shapes()  # or the partition would be invalid
        about = self.engine_body.about
        resizes = "RUNTIME_ACTIVATION_RESIZE_10_10" in about["previews"]
        most = self.engine_body.get_device_memory_size_for_profile_v2(self.profile)
        self.needs = activation_bytes(self.shapes.values()) if resizes else most
        return self.needs

    def _dims(self):
        found = {}
        for name in self.engine_body.inputs:
            dims = self.engine_body.tensors[name].type.tensor_type.shape.dim
            for dim, size in zip(dims, self.shapes.get(name, ()), strict=False):
                if dim.dim_param:
                    assert found.setdefault(dim.dim_param, size) == size
        return found

    def infer_shapes(self):
        wanted = self.engine_body.about["profiles"]
        return [name for name in (wanted[0] if wanted else {}) if name not in self.shapes]

    def get_tensor_shape(self, name):
        found = self._dims()
        dims = self.engine_body.tensors[name].type.tensor_type.shape.dim
        return tuple(dim.dim_value or sized(dim.dim_param, found) for dim in dims)

    def set_device_memory(self, memory, size):
        assert memory % 2 == 0
        self.memory = (memory, size)

    def set_tensor_address(self, name, memory):
        self.addresses[name] = memory
        return name in self.engine_body.tensors

    def execute_async_v3(self, stream_handle):
        assert stream_handle == 77  # the device's stream
        assert self.strategy is self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        assert self.memory[1] >= self.needs + self.engine_body.weight_streaming_scratch_memory_size
        shapes, addresses, memory = dict(self.shapes), dict(self.addresses), self.memory
        if self.simulation.capturing is not None:
            reshaped = self.reshaped

            def launch():
                assert self.reshaped == reshaped, "the context of this graph was given other shapes"
                assert self.memory == memory, "the context of this graph was given other memory"
                self.simulation.check_memory(memory)
                self._run(shapes, addresses)

            self.simulation.capturing.append(launch)
            return True
        self.simulation.check_memory(self.memory)
        self._run(shapes, addresses)
        return True

    def _run(self, shapes, addresses):
        if self.version != self.engine_body.version:
            options = onnxruntime.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 3, 1
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            self.session = onnxruntime.InferenceSession(widened(self.engine_body.model).SerializeToString(), options)
            self.version = self.engine_body.version
        fed = {name: self._array(name, shapes.get(name, ()), addresses) for name in self.engine_body.inputs}
        names = [v.name for v in self.engine_body.model.graph.output]
        for name, made in zip(names, self.session.run(names, fed), strict=True):
            target = self._array(name, made.shape, addresses)
            target[...] = made

    def _array(self, name, shape, addresses):
        dtype = np.dtype(NUMPY[self.engine_body.tensors[name].type.tensor_type.elem_type])
        count = int(np.prod(shape))
        memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(addresses[name])
        return np.frombuffer(memory, dtype=dtype).reshape(shape)


class Inspector(Body):
    execution_context = None

    def __init__(self, simulation, module, engine):
        super().__init__(simulation, module)
        self.engine_body = engine

    def get_engine_information(self, format):  # noqa: A002 - the bindings' name
        assert format is self.module.LayerInformationFormat.JSON
        assert self.execution_context is not None  # or formats would be unknown for dynamic shapes
        assert self.engine_body.about["verbosity"] == "DETAILED"
        model = onnx.shape_inference.infer_shapes(self.engine_body.model)
        types_ = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.input)}
        types_ |= {t.name: t.data_type for t in model.graph.initializer}
        makers = {name: node for node in model.graph.node for name in node.output}
        layers = []
        for node in model.graph.node:
            if node.op_type in PRODUCTS:
                taken = node.input[0]
                maker = makers.get(taken)
                if maker is not None and maker.op_type == "DequantizeLinear":
                    taken = maker.input[0]
                dtype = self.simulation.other_precision.get(node.name, SPELLED.get(types_.get(taken), "Float"))
                weight = makers.get(node.input[1])
                weight = makers.get(weight.input[0]) if weight is not None and weight.op_type == "Transpose" else weight
                codes = weight is not None and weight.op_type == "DequantizeLinear"
                beside = (
                    [(weight.input[0], SPELLED[types_[weight.input[0]]]), (weight.input[1], "Half")] if codes else []
                )
                layers.append(
                    {
                        "Name": f"{node.name} + fused",
                        "LayerType": "CaskConvolution" if node.op_type == "Conv" else "gemm",
                        "Inputs": [
                            {"Name": name, "Location": "Device", "Format": "Row major linear", "DataType": spelled}
                            for name, spelled in [(taken, dtype), *beside]
                        ],
                        "Outputs": [{"Name": node.output[0], "Format": "Row major linear", "DataType": dtype}],
                        "Metadata": f"[ONNX Layer: {node.name}]",
                    }
                )
        layers.append({"Name": "Reformatting CopyNode", "LayerType": "Reformat", "Inputs": [], "Outputs": []})
        io = [{"Name": name, "IOMode": "Input" if name in self.engine_body.inputs else "Output"} for name in types_]
        return json.dumps({"Layers": layers, "I/O Tensors": io})


class Weights(Body):
    def __init__(self, simulation, module, type=None, ptr=0, count=0):  # noqa: A002 - the bindings' names
        super().__init__(simulation, module)
        self.dtype, self.ptr, self.size = type, ptr, count


class Refitter(Body):
    def __init__(self, simulation, module, engine, logger):
        super().__init__(simulation, module)
        self.engine_body, self.held = engine._body, {}
        assert self.engine_body.refittable

    def _tensors(self):
        return {t.name: t for t in self.engine_body.model.graph.initializer if t.data_type in ONNX_DTYPES.values()}

    def get_all_weights(self):
        return list(self._tensors())

    def get_missing_weights(self):
        return [name for name in self.simulation.extra_missing if self.held and name not in self.held][:1]

    def set_named_weights(self, name, weights):
        tensor = self._tensors().get(name)
        if tensor is None or weights._body.dtype.name != NAMES[tensor.data_type]:
            return False
        array = numpy_helper.to_array(tensor)  # of bfloat16 by ml_dtypes, in two bytes
        if array.size != weights._body.size:
            return False
        self.held[name] = weights._body.ptr, array.nbytes  # where it lies, as the real one does
        return True

    def unset_named_weights(self, weights_name):
        return self.held.pop(weights_name, None) is not None

    def refit_cuda_engine(self):
        if self.get_missing_weights():
            return False
        for index, (name, (address, size)) in enumerate(self.held.items()):
            if index == self.simulation.refit_fails_after:
                return False  # with some weights exchanged
            self._tensors()[name].raw_data = ctypes.string_at(address, size)
            self.engine_body.version += 1
        return True


class ParserRefitter(Body):
    num_errors = 0
    buffers = ()

    def __init__(self, simulation, module, refitter, logger):
        super().__init__(simulation, module)
        self.refitter = refitter._body

    def refit_from_file(self, model):
        self.buffers = []
        for tensor in onnx.load(model).graph.initializer:
            if tensor.name in self.refitter._tensors():
                data = numpy_helper.to_array(tensor).tobytes()
                self.buffers.append(ctypes.create_string_buffer(data, len(data)))
                self.refitter.held[tensor.name] = ctypes.addressof(self.buffers[-1]), len(data)
        self.simulation.released += self.buffers
        return True

    def __del__(self):
        for buffer in self.buffers:  # what the parser owned goes with it: others write there
            ctypes.memset(buffer, 0xFF, len(buffer))
