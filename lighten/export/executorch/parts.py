"""Which operators of a program XNNPACK runs together.

ExecuTorch's own partitioner merges parts pair by pair, and walks the whole graph for each pair, which takes minutes for
thirty blocks. Here every operator gets a level: the number of times that a way from the inputs to it leaves XNNPACK and
comes back. What XNNPACK runs of one level is one part. No part can then depend on itself by way of another operator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from typing import Any

from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from torch.fx.passes.infra.partitioner import Partition


def levels(inputs: Mapping[int, Sequence[int]], taken: Sequence[bool]) -> dict[int, int]:
    """Returns the level of every unit of a graph.

    Args:
        inputs: for each unit, those whose values it reads.
        taken: whether XNNPACK runs it.

    Raises:
        CycleError: the units need each other's values.
    """
    found: dict[int, int] = {}
    for unit in TopologicalSorter(inputs).static_order():
        found[unit] = max((found[each] + (taken[unit] and not taken[each]) for each in inputs[unit]), default=0)
    return found


class Partitioner(XnnpackPartitioner):  # type: ignore[misc]
    """XNNPACK's choice of operators, in parts by level."""

    def generate_partitions(self, ep: Any) -> list[Partition]:
        """See ExecuTorch. Operators of one group, such as the rounding of inputs and its product, stay together."""
        groups = self.get_matched_nodes_from_configs(ep)
        units = [[node for node in group if node.op == "call_function"] for group in groups]
        grouped = {node for unit in units for node in unit}
        alone = [node for node in ep.graph_module.graph.nodes if node.op == "call_function" and node not in grouped]
        units += [[node] for node in alone]
        place = {node: number for number, unit in enumerate(units) for node in unit}
        inputs = {
            number: sorted({place[each] for node in unit for each in node.all_input_nodes if each in place} - {number})
            for number, unit in enumerate(units)
        }
        found = levels(inputs, [number < len(groups) for number in range(len(units))])
        parts: dict[int, list[Any]] = {}
        for number, group in enumerate(groups):
            parts.setdefault(found[number], []).extend(group)  # with its constants, which go into the part
        # linears that share their rounded inputs name them both
        return [Partition(id=level, nodes=list(dict.fromkeys(each))) for level, each in sorted(parts.items())]
