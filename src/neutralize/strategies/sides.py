"""The two sides of a plain layer: its own weights, and the weights of the affine layers that read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from neutralize.dataflow import op_name
from neutralize.errors import NeutralizeError
from neutralize.planner import Request
from neutralize.readers import Read, reads_of
from neutralize.rules import REARRANGE
from neutralize.sites import Affine, AffineSite, Norm, affine_site, describe

SIDES = {
    "in": "the layer's own weights",
    "out": "the weights that read it",
    "both": "its own weights and those that read it",
}


def check_sides(strategy: str, sides: str) -> None:
    """Check the name of a side.

    Raises:
        NeutralizeError: it is none.
    """
    if sides not in tuple(SIDES):  # by equality: what was given may not be hashable
        raise NeutralizeError(f"{strategy}: expected in, out or both for sides, got {sides!r}; use one of these")


def sites_of(request: Request, layer: str) -> list[AffineSite]:
    """The affine site of every call of a layer.

    Raises:
        NeutralizeError: a call is not one affine op.
    """
    found = [affine_site(request.flow, call) for call in request.calls(layer)]
    sites = [site for site in found if site is not None]
    if len(sites) != len(found):
        raise NeutralizeError(
            f"plan: expected one affine layer (linear, convolution) for {layer!r}, got a "
            f"{type(request.layers[layer]).__name__}; "
            "select the affine layers inside it, or use sides='in'"
        )
    return sites


def outgoing_consumers(request: Request, layer: str, *, required: bool, keeps_order: bool = False) -> list[Affine]:
    """The affine modules that read a layer, through views, pools and sums, and that no other layer shares.

    Each reads nothing but the layer: what its input is multiplied by, the layer is.

    Args:
        request: the request.
        layer: qualified name.
        required: whether it is an error if there are none, or if something else reads the layer too.
        keeps_order: what is done to them is a factor that is not negative: maxima may stand in between.

    Raises:
        NeutralizeError: see ``required``; or a consumer is shared with another path.
    """
    if not required and any(affine_site(request.flow, call) is None for call in request.calls(layer)):
        return []
    consumers: list[Affine] = []
    others: list[str] = []
    reads, rest = reads_of(request.flow, [site.result for site in sites_of(request, layer)])
    others.extend(describe(node, request.flow) for node in rest)
    for read in reads:
        why = why_not_alone(request, read, keeps_order=keeps_order)
        if why:
            others.append(why)
        elif isinstance(read.reader, Affine):
            consumers.append(read.reader)
    consumers = unique(consumers)
    if required and (others or not consumers):
        found = ", ".join(sorted(set(others))) or "nothing"
        raise NeutralizeError(
            f"plan: expected affine layers, and nothing else, to read {layer!r}, got {found}; use sides='in'"
        )
    if others:
        return []
    check_shared(request, layer, consumers)
    return consumers


def why_not_alone(request: Request, read: Read, *, keeps_order: bool) -> str:
    """Why a reader's weight does not stand for what the layer alone contributes, in words, or ``""``."""
    reader = read.reader
    label, module = repr(reader.label), request.modules.get(reader.module)
    if isinstance(reader, Norm):
        return f"the {reader.kind.replace('_', ' ')} of {label}, which is not homogeneous"
    if read.features is not None:
        return f"{label} behind a concatenation"
    if read.ordered and not keeps_order:
        return f"{label} behind a maximum"
    if not isinstance(reader, Affine) or not reader.module or module is None or next(module.children(), None):
        return f"{reader.weight!r}, which is not the weight of an affine module"
    return ""


def unique(consumers: Iterable[Affine]) -> list[Affine]:
    """Each op's weight once, in order: a recurrent op has one for each direction."""
    found: dict[tuple[fx.Node, str], Affine] = {}
    for consumer in consumers:
        found.setdefault((consumer.node, consumer.weight), consumer)
    return list(found.values())


def check_shared(request: Request, layer: str, consumers: list[Affine]) -> None:
    """Check that the weights and biases of the consumers are read by nothing else.

    Raises:
        NeutralizeError: one is, perhaps because it is tied to another parameter; both are named.
    """
    nodes: dict[fx.Node, tuple[str, ...]] = {}
    for consumer in consumers:
        names = tuple(name for name in (consumer.weight, consumer.bias) if name is not None)
        nodes[consumer.node] = (*nodes.get(consumer.node, ()), *names)
        if consumer.added is not None:
            nodes[consumer.added] = ()
    check_own(request, layer, nodes)


def check_own(request: Request, layer: str, nodes: Mapping[fx.Node, tuple[str, ...]]) -> None:
    """Check that the parameters of ops are read by these ops alone.

    Args:
        request: the request.
        layer: qualified name of the layer that the ops read.
        nodes: each op with its parameters.

    Raises:
        NeutralizeError: one is read elsewhere, perhaps because it is tied to another parameter; both are named.
    """
    ours = set(nodes)
    for name in (name for names in nodes.values() for name in names):
        foreign = [user for user in request.flow.users(name) if not _read_by(user, ours)]
        if foreign:
            also = [alias for alias in request.flow.tied[name] if alias != name]
            tied = f" (it is tied to {', '.join(map(repr, also))})" if also else ""
            raise NeutralizeError(
                f"plan: expected {name!r}, which reads {layer!r}, to read nothing else, got a consumer that is "
                f"shared{tied}; rewriting it would change the other path: untie or copy it first, or use "
                "strategy='zero' with sides='in'"
            )


def _read_by(node: fx.Node, ours: set[fx.Node]) -> bool:
    """Whether a reader of a weight is one of our ops, or a view that only they (or nothing) read."""
    if node in ours:
        return True
    return op_name(node) in REARRANGE and all(_read_by(user, ours) for user in node.users)
