"""Which layers of a model do the same: every operation of each is recorded, on tensors without storage, and compared.

A model that is exported with some of its layers alone is the whole model once they are repeated, if all that happens
outside of its layers is the same with few layers as with all, and if each layer takes one tensor from the layer before
it and does what one of those does. Whatever cannot be seen here is a reason to export the whole model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from instantrt.compiler.frontend.interface import example, wrapped
from instantrt.compiler.frontend.model import Interface

Tensor = torch.Tensor
# Python's numbers become tensors by these, and tensors without storage lose them.
CONSTANTS = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy)
OUTSIDE = -1


class UnlikeError(Exception):
    """Why a model's layers are not exported once and repeated, in words for its user."""


@dataclass(frozen=True)
class Layers:
    """The layers of a model: the path of their list, and for each the first that does the same."""

    path: str
    alike: tuple[int, ...]

    @property
    def shown(self) -> tuple[int, ...]:
        """The layers that show all there is to repeat, in the order in which they are exported.

        The first, which takes its input from elsewhere; one of each other kind; and last a twin of one of these, to
        prove what is repeated. UnlikeError where that takes all of them.
        """
        again = 0 in self.alike[1:]
        chosen = [0, *(kind for kind in dict.fromkeys(self.alike) if kind)]
        twins = (i for i, kind in enumerate(self.alike) if i not in chosen and (kind == 0 or not again))
        if (twin := next(twins, None)) is None or len(chosen) + 1 == len(self.alike):
            kinds = len({*self.alike})
            raise UnlikeError(f"its {len(self.alike)} layers are of {kinds} kinds, which too few of them show")
        return *chosen, twin


def find_layers(model: Any, shape: Interface) -> Layers:
    """The layers of `model`, compared; UnlikeError if they cannot be repeated."""
    lists = [p for p, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == shape.layers]
    if len(lists) != 1:
        raise UnlikeError(f"{len(lists)} lists of modules are as long as the model is deep")
    whole = record(model, shape, lists[0])
    layers = Layers(lists[0], tuple(whole.layers.index(each) for each in whole.layers))
    with some_layers(model, layers.path, layers.shown) as few:
        some = record(model, shape.with_layers(few), layers.path)
    if some.outside != whole.outside or some.layers != [whole.layers[index] for index in layers.shown]:
        raise UnlikeError("what it does outside of its layers depends on their number")
    return layers


@contextmanager
def some_layers(model: Any, path: str, chosen: Sequence[int]) -> Iterator[int]:
    """`model` has the layers `chosen` inside, each numbered by its place; its config still says how many it has.

    What else a model's code may read of their numbers is seen when those layers are recorded.
    """
    parent, _, name = path.rpartition(".")
    modules = model.get_submodule(parent)._modules
    whole = modules[name]
    configs = {id(m.config): vars(m.config) for m in model.modules() if hasattr(m, "config")}
    with unchanged(model), ExitStack() as stack:
        for place, index in enumerate(chosen):
            for module in whole[index].modules():
                if getattr(module, "layer_idx", None) == index:
                    module.layer_idx = place
        for config in configs.values():
            if isinstance(old := config.get("layer_types"), list) and len(old) == len(whole):
                stack.callback(config.update, layer_types=old)
                config["layer_types"] = [old[index] for index in chosen] + old[len(chosen) :]
        modules[name] = torch.nn.ModuleList(whole[index] for index in chosen)
        yield len(chosen)


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """What a model's own code keeps in its modules while it runs inside is dropped afterwards.

    Tables that are made in the first call are none of the next, which runs on other tensors.
    """
    own = [module.__dict__ for module in model.modules()]
    kept = [*own, *(value for each in own for value in each.values() if isinstance(value, dict | list | set))]
    before = [(each, copy(each)) for each in kept]
    try:
        yield
    finally:
        for each, was in before:
            each.clear()
            each.extend(was) if isinstance(each, list) else each.update(was)


@dataclass
class Recording:
    """What was done outside of the layers, and in each: operations with all that they were given."""

    outside: list[Hashable] = field(default_factory=list)
    layers: list[list[Hashable]] = field(default_factory=list)


def record(model: Any, shape: Interface, path: str) -> Recording:
    """Runs the model on tensors of the meta device; UnlikeError where a layer is entangled with more than the last."""
    module = wrapped(model, shape)
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    meta = {name: tensor.to("meta") for name, tensor in named.items()}
    recorder = Recorder(f"model.{path}.", shape)
    try:
        with unchanged(model), ExitStack() as stack:
            for index, layer in enumerate(model.get_submodule(path)):
                enter = layer.register_forward_pre_hook(partial(recorder.enter, index), with_kwargs=True)
                leave = layer.register_forward_hook(partial(recorder.leave, index))
                stack.callback(enter.remove)
                stack.callback(leave.remove)
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.device("meta"))
            inputs = example(shape)
            recorder.know(named, meta, inputs)
            stack.enter_context(recorder)
            stack.enter_context(Constants(recorder))
            logits, present = torch.func.functional_call(module, meta, inputs)
            recorder.finish(logits, present)
    except UnlikeError:
        raise
    except Exception as error:  # a model's own code, run on tensors that it may not expect
        raise UnlikeError(f"a run without storage ended in {type(error).__name__}: {error}") from error
    return recorder.recording


class Constants(TorchFunctionMode):
    """Writes down the numbers that Python's code makes tensors of: without storage they have no values."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in CONSTANTS:
            if not plain(args[0]):
                raise UnlikeError("an array of its code becomes a tensor")
            self.recorder.wrote(func.__name__, repr((args, kwargs)), result)
        return result


def written(value: Any, tensor: Callable[[Tensor], Hashable]) -> Hashable:
    """An argument of an operation; `tensor` says what each tensor in it is."""
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, list | tuple):
        return tuple(written(each, tensor) for each in value)
    if isinstance(value, dict):
        return tuple((key, written(each, tensor)) for key, each in value.items())
    return repr(value)  # 0.0 and -0.0 are equal, and so are 1 and 1.0


def form_of(tensor: Tensor) -> Hashable:
    """What the sizes of a result depend on."""
    return tensor.shape, tensor.stride(), tensor.dtype


def plain(value: Any) -> bool:
    """Numbers, or lists of them: what is written down whole, where long arrays are shortened."""
    if isinstance(value, list | tuple):
        return all(plain(each) for each in value)
    return isinstance(value, int | float | complex)


class Recorder(TorchDispatchMode):
    """Writes down every operation, each tensor as what it is to the layer that reads it.

    `path` is the prefix of the names of what layers own. A tensor is named by who made it, (layer, number), seen from
    the layer that reads it; a weight by its name in the layer; keys and values by the layer they are of, counted from
    the one that reads them.
    """

    def __init__(self, path: str, shape: Interface) -> None:
        super().__init__()
        self.path, self.recording = path, Recording(layers=[[] for _ in range(shape.layers)])
        self.now, self.last = OUTSIDE, OUTSIDE  # the layer that runs, and the one that ran
        self.hidden: Tensor | None = None  # what goes from layer to layer
        self.names: dict[int, tuple[str, int, Hashable]] = {}  # of each tensor by its id: kind, layer, what
        self.alive: list[Any] = []  # ids are of use as long as their owners live
        self.known: dict[Hashable, Callable[[], Tensor]] = {}  # operation, on what it looks at -> its like

    def know(self, named: Mapping[str, Tensor], meta: Mapping[str, Tensor], inputs: Any) -> None:
        """What there is before anything runs: weights and buffers, and the inputs with the cache."""
        buffers = {name: tensor for name, tensor in named.items() if not isinstance(tensor, torch.nn.Parameter)}
        for name, tensor in meta.items():
            layer, own = OUTSIDE, name
            if name.startswith(self.path):
                index, _, own = name.removeprefix(self.path).partition(".")
                layer = int(index)
            value = hashlib.sha256(buffers[name].numpy().tobytes()).hexdigest() if name in buffers else ""
            self.name(tensor, "weight", layer, (own, tuple(tensor.shape), tensor.dtype, value))
        tokens = [given for given in inputs if isinstance(given, Tensor)]
        for place, tensor in enumerate(tokens):
            self.name(tensor, "input", OUTSIDE, place)
        for layer, pair in enumerate(pair for past in inputs[len(tokens) :] for pair in past):
            for part, tensor in zip(("key", "value"), pair, strict=True):
                self.name(tensor, "past", layer, part)

    def name(self, tensor: Tensor, kind: str, layer: int, what: Hashable) -> None:
        self.alive.append(tensor)
        self.names[id(tensor)] = kind, layer, what

    def seen(self, value: Any) -> Hashable:
        """An argument as the layer that runs now sees it."""
        return written(value, self.seen_tensor)

    def seen_tensor(self, tensor: Tensor) -> Hashable:
        if tensor is self.hidden:
            return "hidden"
        if id(tensor) not in self.names:
            raise UnlikeError("a tensor that nothing recorded makes")
        kind, layer, what = self.names[id(tensor)]
        if kind in ("weight", "past") and OUTSIDE != self.now != layer != OUTSIDE:
            raise UnlikeError(f"layer {self.now} reads a {kind} of layer {layer}")
        if self.now == OUTSIDE:
            if layer != OUTSIDE and kind == "made":
                raise UnlikeError(f"a value of layer {layer} is used outside of it")
            return kind, layer, what
        return kind, layer - self.now if layer != OUTSIDE else "outside", what

    def note(self, what: Hashable) -> int:
        """Writes down, and tells which number it got."""
        if self.now == OUTSIDE and OUTSIDE < self.last < len(self.recording.layers) - 1:
            raise UnlikeError("something is computed between two layers")
        notes = self.recording.outside if self.now == OUTSIDE else self.recording.layers[self.now]
        notes.append(what)
        return len(notes)

    def wrote(self, what: str, given: Hashable, result: Any) -> None:
        """An operation, and all that it made."""
        made = [t for t in (result if isinstance(result, list | tuple) else (result,)) if isinstance(t, Tensor)]
        number = self.note((what, given, tuple((tuple(t.shape), t.dtype) for t in made)))
        for place, tensor in enumerate(made):
            self.name(tensor, "made", self.now, (number, place))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = self.seen(args), self.seen(kwargs or {})
        result = self.made(func, args, kwargs or {})
        self.wrote(str(func), given, result)
        return result

    def made(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation makes. One that makes a tensor is asked for its sizes once, whichever layer it is in."""
        form = func, written(args, form_of), written(kwargs, form_of)
        if (known := self.known.get(form)) is not None:
            return known()
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.device.type != "meta":  # ONNX operators make theirs where they like
            result = torch.empty_like(result, device="meta")
        if isinstance(result, Tensor) and not (func.is_view or func._schema.is_mutable):
            self.known[form] = partial(
                torch.empty_strided, result.shape, result.stride(), dtype=result.dtype, device="meta"
            )
        return result

    def enter(self, index: int, module: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        given = args[0] if args else kwargs.get("hidden_states")
        if self.now != OUTSIDE or index != self.last + 1 or not isinstance(given, Tensor):
            raise UnlikeError("its layers do not run one after the other")
        if index and given is not self.hidden:
            raise UnlikeError(f"layer {index} does not take what layer {index - 1} gives")
        if not index:
            self.recording.outside.append(("hidden", self.seen(given)))
        self.now, self.hidden = index, given

    def leave(self, index: int, module: Any, args: Any, output: Any) -> None:  # noqa: ARG002
        hidden = output[0] if isinstance(output, tuple | list) else output
        self.note(("gives", self.seen(hidden)))
        self.now, self.last, self.hidden = OUTSIDE, index, hidden

    def finish(self, logits: Tensor, present: Any) -> None:
        """Each layer gives its own keys and values."""
        self.note(("logits", self.seen(logits)))
        for self.now, pair in enumerate(present):
            self.note(("present", self.seen(pair)))
