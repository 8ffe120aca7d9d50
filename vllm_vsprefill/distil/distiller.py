# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""One forward pass of the frozen model, all layers of all students learning from it on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vllm_vsprefill.distil.capture import LayerCall
from vllm_vsprefill.distil.model import Teacher
from vllm_vsprefill.distil.student import Student, features
from vllm_vsprefill.distil.targets import Range, TargetKind, Targets, compute


class Distiller:
    """Runs sequences through the teacher and adds the students' gradients.

    A layer's queries, keys and values live until its students have learnt from them: memory does not grow with the
    number of layers, but for the indexers and their optimisers.

    Args:
        teacher: the frozen model.
        students: indexers that learn from the same stream, on the teacher's device.
        dtype: of the students' matrix products.
    """

    def __init__(self, teacher: Teacher, students: Sequence[Student], dtype: torch.dtype) -> None:
        self.teacher, self.students, self.dtype = teacher, tuple(students), dtype
        self._place = {index: i for i, index in enumerate(teacher.layers.covered)}
        # Seconds in the target kernels, by CUDA events or the clock; only where asked for.
        self.timing = False
        self.target_seconds: list[Callable[[], float]] = []

    def learn(self, ids: Tensor, ranges: Sequence[Range], weight: float) -> Tensor:
        """Add the gradients of one sequence, times ``weight``.

        Returns:
            KL divergences and losses, float32 ``[students, layers, 4]``: KL of columns and diagonals, loss of both.
        """
        return self._run(ids, ranges, weight)

    def evaluate(
        self, ids: Tensor, ranges: Sequence[Range], each: Callable[[Student, LayerCall, Tensor], None] | None = None
    ) -> Tensor:
        """The same figures without learning; ``each`` is given every student's logits ``[Hkv, n, 2]`` of a layer."""
        return self._run(ids, ranges, None, each)

    def _run(
        self,
        ids: Tensor,
        ranges: Sequence[Range],
        weight: float | None,
        each: Callable[[Student, LayerCall, Tensor], None] | None = None,
    ) -> Tensor:
        kinds = tuple(dict.fromkeys(student.kind for student in self.students))
        out = torch.zeros(len(self.students), len(self._place), 4, device=self.teacher.device)

        def layer(call: LayerCall) -> None:
            targets = self._targets(call, ranges, kinds)
            made: dict[str, Tensor] = {}
            for s, student in enumerate(self.students):
                inputs = student.options.inputs
                if inputs not in made:
                    made[inputs] = features(inputs, call, self.dtype)
                with torch.set_grad_enabled(weight is not None):
                    logits = student.logits(call, made[inputs])
                    loss, divergence = student.losses(logits, ranges, [t[student.kind] for t in targets])
                    if weight is not None:
                        (loss.sum() * weight).backward()
                out[s, self._place[call.layer]] = torch.cat((divergence, loss.detach()))
                if each is not None:
                    each(student, call, logits.detach())

        self.teacher.run(ids, layer)
        return out

    def _targets(
        self, call: LayerCall, ranges: Sequence[Range], kinds: Sequence[TargetKind]
    ) -> list[dict[TargetKind, Targets]]:
        if not self.timing:
            return [compute(call, part, kinds) for part in ranges]
        if call.q.is_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            targets = [compute(call, part, kinds) for part in ranges]
            end.record()
            self.target_seconds.append(lambda: begin.elapsed_time(end) / 1000)
            return targets
        start = time.perf_counter()
        targets = [compute(call, part, kinds) for part in ranges]
        spent = time.perf_counter() - start
        self.target_seconds.append(lambda: spent)
        return targets
