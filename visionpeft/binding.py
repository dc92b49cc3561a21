"""How adapters act: the only file that touches module classes and `_parameters`.

The module that is *called* gets a cached subclass of its own class, with the same name, whose `forward` consults the
adapters in one reserved child of the module, the `Holder`. So the object stays the same, `isinstance` stays true, the
base keys stay unchanged, and deepcopy, pickle, `.to`, DDP, FSDP2 and `torch.compile` see ordinary modules. What it
does there, `visionpeft.acting` says.

Tensors that learn in place are replaced by a trainable copy, the original set aside in the holder.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from visionpeft.adapter import Adapter
from visionpeft.errors import SiteError, VisionPEFTError

SLOT = "peft"
SAMPLES = "*"  # user name under which a root has one adapter per sample; what begins so is no adapter's name

_MODULES = ("linear", "conv", "norm", "embed")  # kinds of site that are a module with a weight
_fired: set[int] | None = None  # ids of the adapters consulted, while a probe looks


class Tap:
    """Input x and output y of the first module of a residual branch, kept until its last."""

    x: Tensor | None = None
    rest: tuple[Any, ...] = ()  # what the block was given besides its tokens
    y: Tensor | None = None


class Holder(nn.Module):
    """All that is ours at one module.

    Children: for each adapter name a ModuleDict from part to adapter.

    Attributes:
        active: names of the adapters that act, in order; here or elsewhere in the model. Set by `act`.
        now: the adapters here that act. Compiled code sees these alone and no names, so that others of the same kind
            take their place without a new graph.
        levers: names of the mixins here whose users act.
        live: tensor name -> name of the adapter whose trainable copy stands in the module.
        aside: originals of tensors that learn in place (by name) or are merged (name of the adapter, dot, name). No
            buffers: DDP would send them, torch.export would want them, and `.to` would make other objects of them.
        hidden: names whose tensors are left out of the state dict (merged ones).
        written: `shira.switch` has put an adapter into the weight.
        route: how all here computes: "rebuild" or "keep" the input in the fused function, or "plain" torch.
        tap: input of the residual branch that begins here, taps: all that this block must clear.
        thawed: a BatchNorm's statistics may learn, since an adapter that acts wants them to.
        mixed: each sample has its own adapter, and only the root (with `samples` and `backbone`) may say which acts.
        chain: blocks among which this one is undone in backward, and its place there: first, middle or last.
        attention: backend and number of tokens that `set_attention` chose.
        switches: attribute of the module -> {user: its value while that user acts}; saved: their values before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.now: list[Adapter] | None = []
        self.levers: tuple[str, ...] = ()
        self.hidden: tuple[str, ...] = ()
        self.route = "rebuild"
        self.written = False
        self.tap: Tap | None = None
        self.taps: tuple[Tap, ...] = ()
        self.saved: dict[str, Any] = {}
        self.switches: dict[str, dict[str, Any]] = {}
        self.live: dict[str, str] = {}
        self.aside: dict[str, Tensor | None] = {}
        self.thawed = False
        self.mixed = False
        self.samples: tuple[str | None, ...] | None = None
        self.backbone: Any = None
        self.chain: Any = None
        self.attention: tuple[str, int | None] | None = None
        self.users: dict[str, tuple[type[Mixin], ...]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """The identity: a Sequential that holds us passes through."""
        return x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Holder:
        super()._apply(fn, recurse)
        for name, tensor in self.aside.items():
            if tensor is not None:
                self.aside[name] = _moved(tensor, fn)
        return self

    def act(self, names: tuple[str, ...], route: str | None = None) -> None:
        """Say whose adapters act from now on, and by which route if that changes.

        Past `nn.Module.__setattr__`, which looks for parameters: there are hundreds of us.
        """
        boxes: list[Any] = [self._modules[name] for name in names if name in self._modules]
        route, now = route or self.route, [adapter for box in boxes for adapter in box.values() if adapter.kind]
        levers = tuple(sorted({m.__name__ for name in names for m in self.users.get(name, ())}))
        self.__dict__.update(active=names, route=route, now=now, levers=levers)
        for adapter in now:
            adapter.__dict__["route"] = route

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.now = None
        return replica

    def acting(self, *kinds: str) -> list[Adapter]:
        """Adapters of sites of these kinds (all but branches and blocks if none is given) that act, in order."""
        if self.mixed:
            raise VisionPEFTError("each sample has its own adapter: call the model itself, not a part or other method")
        if self.now is None:  # a replica of nn.DataParallel, whose children came after its attributes
            self.act(self.active)
        adapters = [a for a in self.now or () if a.kind in (kinds or _MODULES)]
        if adapters and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            refuse_reentrant()
            fetch(adapters)
        if _fired is not None:
            _fired.update(map(id, adapters))
        return adapters

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        out = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for key in [k for k in out if k.startswith(prefix) and k[len(prefix) :].split(".")[0] in self.hidden]:
            del out[key]
        return out


def fetch(adapters: Iterable[Adapter]) -> None:
    """Have accelerate bring back tensors of adapters that it offloads module by module.

    It does so before a module's forward, and here tensors are read where no forward of theirs is called. They stay,
    being small. Without gradients only, since what it brings are other objects than the optimiser has.
    """
    for adapter in adapters:
        if (hook := adapter.__dict__.get("_hf_hook")) is not None and any(p.is_meta for p in adapter.parameters()):
            hook.pre_forward(adapter)


def offloaded(module: nn.Module) -> bool:
    """Whether accelerate puts the module's own tensors away after each forward, and has them somewhere else."""
    hook = module.__dict__.get("_hf_hook")
    return any(getattr(h, "offload", False) for h in (hook, *getattr(hook, "hooks", ())))


def refuse_reentrant() -> None:
    """Refuse to run inside reentrant checkpointing; called where there are no gradients.

    It runs forward without them, and all adapters in a part whose input needs none learn nothing: torch gives a warning
    once, and no error.
    """
    frame = sys._getframe(2)
    while (above := frame.f_back) is not None:
        if frame.f_code is _REENTRANT:
            raise VisionPEFTError(
                "reentrant checkpointing: adapters may silently learn nothing in it. Give use_reentrant=False "
                '(transformers: model.gradient_checkpointing_enable({"use_reentrant": False})), or attach with '
                'memory="checkpoint"'
            )
        frame = above


_REENTRANT = CheckpointFunction.forward.__code__


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """The same object with its data moved or cast, as nn.Module does for parameters; a new one to and from meta."""
    with torch.no_grad():
        data = fn(tensor.detach())
        if tensor.is_meta == data.is_meta:
            tensor.data = data
            return tensor
    return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def holder(module: nn.Module) -> Holder | None:
    """Ours at a module, None if there is nothing of ours."""
    found = module._modules.get(SLOT)
    return found if isinstance(found, Holder) else None


class Mixin:
    """What a module does while it is dressed; a smaller `layer` stands further in front; `stays` when merged."""

    layer: ClassVar[int]
    stays: ClassVar[bool] = False
    peft: Holder

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):  # type: ignore[no-untyped-def]
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)  # type: ignore[misc]
        weight = self._parameters.get("weight")  # type: ignore[attr-defined]
        if weight is not None and f"{prefix}weight" in state_dict:
            alone = not any(key.startswith(f"{prefix}{SLOT}.") for key in state_dict)
            boxes: list[Any] = [self.peft._modules[name] for name in self.peft.users if name in self.peft._modules]
            for adapter in [adapter for box in boxes for adapter in box.values() if adapter.kind]:
                if (wrong := adapter.reloaded(weight, alone)) is not None:
                    errors.append(wrong)


class FrozenStatistics(Mixin):
    """A BatchNorm whose running statistics stay as they are."""

    layer = 5
    stays = True

    def train(self, mode: bool = True) -> Any:
        super().train(mode)  # type: ignore[misc]
        self.training = mode and self.peft.thawed
        return self


# ---- classes --------------------------------------------------------------------------------------------------------


@functools.cache
def site_class(cls: type, mixins: tuple[type[Mixin], ...]) -> type:
    """The subclass of `cls` with the mixins in front; one per combination, so that compiled code is shared."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce_ex__": _reduce}
    return type(cls.__name__, (*mixins, cls), {**names, "_base": cls, "_mixins": mixins})


def _reduce(self: Any, protocol: Any) -> Any:
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # the owner's, if it has one
    return _rebuild, (self._base, self._mixins), state


def _rebuild(cls: type, mixins: tuple[type[Mixin], ...]) -> Any:
    made: Any = site_class(cls, mixins)
    return made.__new__(made)


def base_class(module: nn.Module) -> Any:
    """The module's class as its owner wrote it."""
    return vars(type(module)).get("_base", type(module))


def grip(module: nn.Module, name: str, *mixins: type[Mixin]) -> Holder:
    """The module's holder, made at need; `name` uses these mixins from now on.

    Raises:
        SiteError: the instance carries a `forward` of its own, which would shadow the binding.
    """
    drop_leftover(module)
    check_forward(module, mixins)
    if holder(module) is None:
        if hasattr(module, SLOT):
            raise SiteError(f"a {type(module).__name__} has an attribute {SLOT!r} of its own, the name that we need")
        module.add_module(SLOT, Holder().train(module.training))
    held = holder(module)
    assert held is not None
    held.users[name] = tuple(dict.fromkeys((*held.users.get(name, ()), *mixins)))
    _dress(module, held)
    return held


def changed(module: nn.Module) -> bool:
    """Whether somebody put a class of their own over ours since (parametrize, weight_norm, FSDP2)."""
    held = holder(module)
    return held is not None and any(held.users.values()) and "_base" not in vars(type(module))


def shadowed(module: nn.Module, mixins: Iterable[type[Mixin]]) -> bool:
    """Whether the instance carries a `forward` of its own, and the mixins bring one that it would shadow."""
    return "forward" in module.__dict__ and any("forward" in vars(mixin) for mixin in mixins)


def check_forward(module: nn.Module, mixins: Iterable[type[Mixin]]) -> None:
    if shadowed(module, mixins):
        raise SiteError(
            f"a {type(module).__name__} carries an instance-level `forward` (accelerate and LyCORIS put one there): "
            "it would shadow the adapter. Remove that wrapper first, attach, then wrap again."
        )


def drop_leftover(module: nn.Module) -> None:
    """Take an instance-level `forward` off that is the class's own: accelerate leaves it when its hooks are removed."""
    own = module.__dict__.get("forward")
    mixins = [vars(cls).get("forward") for cls in type(module).__mro__ if issubclass(cls, Mixin)]
    plain = (base_class(module).forward, *mixins)
    if own is not None and getattr(own, "__self__", None) is module and own.__func__ in plain:
        del module.__dict__["forward"]


def release(module: nn.Module, name: str) -> None:
    """Forget `name` at this module; with its last user the module is as it was."""
    held = holder(module)
    if held is None:
        return
    held.users.pop(name, None)
    held.hidden = tuple(n for n in held.hidden if n != name)
    held._modules.pop(name, None)
    held.act(tuple(n for n in held.active if n != name))
    for values in held.switches.values():
        values.pop(name, None)
    throw_switches(module, held, held.active)
    if not held.users:
        for attribute, value in held.saved.items():
            setattr(module, attribute, value)
        del module._modules[SLOT]
        module.__class__ = base_class(module)
    else:
        _dress(module, held)


def undress(module: nn.Module, name: str) -> None:
    """Take the mixins of `name` off while it is merged; its tensors stay."""
    held = holder(module)
    assert held is not None
    held.users[name] = tuple(m for m in held.users[name] if m.stays)
    _dress(module, held)


def _dress(module: nn.Module, held: Holder) -> None:
    wanted = {m for mixins in held.users.values() for m in mixins}
    mixins = tuple(sorted(wanted, key=lambda m: (m.layer, m.__name__)))
    cls = base_class(module)
    object.__setattr__(module, "__class__", site_class(cls, mixins) if mixins else cls)  # nn.Module's is slow


def switch(module: nn.Module, name: str, attribute: str, value: Any) -> Holder:
    """Have an attribute set whenever `name` acts, see `throw_switches`; gives the module's holder."""
    held = grip(module, name)
    held.saved.setdefault(attribute, getattr(module, attribute))
    held.switches.setdefault(attribute, {})[name] = value
    return held


def throw_switches(module: nn.Module, held: Holder, active: tuple[str, ...]) -> None:
    """Switched attributes take effect while one of their users acts, and are as before while none does.

    Users whose names begin with "*" are no adapters, and always act.
    """
    for attribute, values in held.switches.items():
        acting = [value for name, value in values.items() if name in active or name.startswith("*")]
        setattr(module, attribute, acting[0] if acting else held.saved[attribute])


def walk(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of everything from here on that is not ours, once; a hundred adapters cost nothing."""
    waiting = [(path, module)]
    while waiting:  # a generator for each module would pass every item through all those above it
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        if below := module._modules:
            prefix = f"{path}." if path else ""
            waiting += [(prefix + n, m) for n, m in reversed(below.items()) if m is not None and type(m) is not Holder]


def holders(root: nn.Module) -> Iterator[tuple[str, nn.Module, Holder]]:
    """Path, module and holder of every module from root on that has one."""
    for path, module in walk(root, "", set()):
        if SLOT in module._modules and (held := holder(module)) is not None:
            yield path, module, held


# ---- tensors that are replaced --------------------------------------------------------------------------------------


def get_tensor(module: nn.Module, name: str) -> Tensor | None:
    return module._parameters.get(name) if name in module._parameters else module._buffers.get(name)


def set_tensor(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Put a parameter or a buffer in place without any copy."""
    table = module._parameters if name in module._parameters else module._buffers
    table[name] = value  # type: ignore[assignment]
    if getattr(module, "attention_bias_cache", None):  # timm's LeViT keeps what it computed from its biases
        module.attention_bias_cache = {}  # type: ignore[assignment]
    if isinstance(module, nn.Linear) and name == "weight" and value is not None:
        module.out_features, module.in_features = value.shape


def set_aside(module: nn.Module, name: str) -> None:
    """Keep the original of a tensor in the holder, once."""
    held = holder(module)
    assert held is not None
    held.aside.setdefault(name, get_tensor(module, name))


def original(module: nn.Module, name: str) -> Tensor | None:
    """The tensor as the user's model had it."""
    held = holder(module)
    return held.aside[name] if held is not None and name in held.aside else get_tensor(module, name)


def put_back(module: nn.Module, name: str) -> None:
    """The original in its place again: the same object."""
    held = holder(module)
    assert held is not None
    set_tensor(module, name, held.aside.pop(name))
