"""Does the backend serve a model: right with every tile, nothing compiled again, and how much of it becomes sparse.

The family tests and `python -m mmcompile doctor` run the same checks, so that what is promised of the families is what
a user can have checked of a model of their own.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from mmcompile.diagnosis import CheckResult, Diagnosis, Status
from mmcompile.errors import MMCompileError
from mmcompile.model import compile as compile_model
from mmcompile.options import Options
from mmcompile.prefill import forget_stats, stats
from mmcompile.reference_runs import NEW_TOKENS, Inputs, copy_sharing_weights, generate, prefill, rollout
from mmcompile.watch import WATCHED, Watch, count_attentions, decoder_of, watched

WAYS = ("torch.compile", "mmcompile.compile", "text model")
CHECKS = ("no cache", "cache + decode", "padded batch", "second length", "generate", "sparse")

FP32_TOLERANCE = 1e-4  # of logits that are of the order of 1
HALF_TOLERANCE = 2.0  # in half precision: so many times the error that eager itself has against float32
SPARSE_DENSITY = 0.1

_EVERY_TILE = {"density": 1.0, "min_tokens": 0}


class DoctorError(MMCompileError, ValueError):
    """A way or a check that does not exist, or a model that does not run even in eager mode."""


@dataclass(frozen=True)
class Prompts:
    """Keyword arguments of one model's forward, for prompts that differ in nothing but length and batch.

    first, longer, longest: batch 1, of three lengths. padded: a batch of two, padded on the left, with its
    `attention_mask`.
    """

    first: Inputs
    longer: Inputs
    longest: Inputs
    padded: Inputs


class Doctor:
    """Runs the checks on copies of a model; the copies share its weights, and the model itself is never compiled.

    Args:
        model: in eval mode, with a `generate`, as transformers makes it.
        prompts: its inputs, on its device.
        inner: the backend that compiles the rewritten graphs: "inductor", or "eager" for speed.

    What is expected of each prompt is computed once, by the model in eager mode; in half precision by a float32 copy,
    and allowed is then twice the error that eager has against it.
    """

    def __init__(self, model: nn.Module, prompts: Prompts, *, inner: str = "inductor") -> None:
        self.model, self.prompts, self.inner = model, prompts, inner
        self._checks: dict[str, Callable[[_Visit], _Finding]] = {
            "no cache": self._no_cache,
            "cache + decode": self._cache_and_decode,
            "padded batch": self._padded_batch,
            "second length": self._second_length,
            "generate": self._generate,
            "sparse": self._sparse,
        }

    def diagnose(
        self,
        ways: Sequence[str] = WAYS,
        checks: Sequence[str] = CHECKS,
        *,
        step: Callable[[str], None] = lambda name: None,
    ) -> Diagnosis:
        """Every check of every way; `step` hears of each as it begins."""
        results = []
        for way in ways:
            for check in checks:
                step(f"{way}: {check}")
                results.append(self.check(way, check))
        return Diagnosis(tuple(results))

    def check(self, way: str, check: str) -> CheckResult:
        """One check of one way of compiling.

        An error of the compiled model is a result, not an exception. Raises DoctorError for an unknown name, and
        where the model fails without being compiled.
        """
        for name, known in ((way, WAYS), (check, CHECKS)):
            if name not in known:
                raise DoctorError(f"{name!r}: must be one of {', '.join(known)}")
        causal = self._causal
        forget_stats(self.model)  # of an earlier check: its copy had the same parameters
        begun = time.perf_counter()
        options = {"density": SPARSE_DENSITY, "min_tokens": 0} if check == "sparse" else _EVERY_TILE
        with watched(Options.parse(options | {"inner": self.inner})) as watch, torch.no_grad():
            try:
                visit = _Visit(self._compiled(way, options), watch)
                finding = self._checks[check](visit)
            except DoctorError:
                raise
            except Exception as error:  # whatever a compiled model raises is what we are here to report
                finding = _Finding(f"{type(error).__name__}: {_first_line(error)}")
        rewritten = watch.fewest_rewritten
        status, detail = Status.WORKS, finding.note
        if finding.fault:
            status, detail = Status.FAILS, finding.fault
        elif rewritten == 0 and causal > 0:
            status, detail = Status.DENSE, "; ".join(watch.refusals) or "no attention of the decoder was seen"
        return CheckResult(
            way=way,
            check=check,
            status=status,
            detail=detail,
            error=finding.error,
            allowed=finding.allowed,
            rewritten=rewritten,
            causal=causal,
            graphs=watch.graphs,
            dense=watch.refusals,
            seconds=time.perf_counter() - begun,
        )

    def _compiled(self, way: str, options: dict[str, Any]) -> nn.Module:
        model = copy_sharing_weights(self.model)
        options = options | {"inner": WATCHED}
        if way == "mmcompile.compile":
            return compile_model(model, **options)
        compiled = decoder_of(model) if way == "text model" else model
        compiled.compile(backend="mminference", options=options)
        return model

    # What eager says ---------------------------------------------------------------------------------------------

    def _in_eager(self, model: nn.Module, run: Callable[[nn.Module], Any]) -> Any:
        try:
            with torch.no_grad():
                return run(copy_sharing_weights(model))
        except Exception as error:
            raise DoctorError(
                f"the model does not run on these prompts before it is compiled ({type(error).__name__}: "
                f"{_first_line(error)}); put that right first"
            ) from error

    def _expected(self, run: Callable[[nn.Module], torch.Tensor]) -> tuple[torch.Tensor, float]:
        """What `run` of the model in eager mode returns, and how far from it the compiled model may be."""
        expected = self._in_eager(self._oracle, run)
        if self._oracle is self.model:
            return expected, FP32_TOLERANCE
        return expected, HALF_TOLERANCE * _distance(self._in_eager(self.model, run), expected)

    @cached_property
    def _oracle(self) -> nn.Module:
        single = next(self.model.parameters()).dtype == torch.float32
        return self.model if single else copy.deepcopy(self.model).float()

    @cached_property
    def _causal(self) -> int:
        """How many attentions the decoder runs in one prefill."""
        call = partial(prefill, inputs=self.prompts.first)
        count: int = self._in_eager(self.model, lambda model: count_attentions(model, call))
        return count

    @cached_property
    def _expected_prefills(self) -> list[tuple[torch.Tensor, float]]:
        prompts = (self.prompts.first, self.prompts.longer, self.prompts.longest)
        return [self._expected(partial(prefill, inputs=inputs)) for inputs in prompts]

    @cached_property
    def _expected_padded(self) -> tuple[torch.Tensor, float]:
        return self._expected(partial(prefill, inputs=self.prompts.padded))

    @cached_property
    def _expected_rollout(self) -> tuple[torch.Tensor, float, torch.Tensor]:
        run = partial(rollout, inputs=self.prompts.first)
        tokens = self._in_eager(self._oracle, run).argmax(-1)[:, :-1]
        return *self._expected(partial(run, tokens=tokens)), tokens

    @cached_property
    def _expected_generation(self) -> Any:
        return self._in_eager(self.model, partial(generate, inputs=self.prompts.first))

    # The checks --------------------------------------------------------------------------------------------------

    def _no_cache(self, visit: _Visit) -> _Finding:
        expected, allowed = self._expected_prefills[0]
        return _compare(visit.run(partial(prefill, inputs=self.prompts.first)), expected, allowed)

    def _cache_and_decode(self, visit: _Visit) -> _Finding:
        expected, allowed, tokens = self._expected_rollout
        return _compare(visit.run(partial(rollout, inputs=self.prompts.first, tokens=tokens)), expected, allowed)

    def _padded_batch(self, visit: _Visit) -> _Finding:
        expected, allowed = self._expected_padded
        real = self.prompts.padded["attention_mask"].bool()
        got = visit.run(partial(prefill, inputs=self.prompts.padded))
        return _compare(got[real], expected[real], allowed)

    def _second_length(self, visit: _Visit) -> _Finding:
        findings, graphs = [], []
        lengths = (self.prompts.first, self.prompts.longer, self.prompts.longest)
        for inputs, (expected, allowed) in zip(lengths, self._expected_prefills, strict=True):
            got = visit.run(partial(prefill, inputs=inputs))
            findings.append(_compare(got, expected, allowed))
            graphs.append(visit.watch.graphs)
        worst = max(findings, key=lambda finding: (finding.fault, finding.error or 0.0))
        if worst.fault:
            return worst
        if graphs[2] > graphs[1]:
            return worst.but(f"a third length compiled {graphs[2] - graphs[1]} graphs again")
        if visit.rewritten[-1] < visit.rewritten[0]:
            return worst.but(
                f"{visit.rewritten[-1]} of {visit.rewritten[0]} rewritten attentions ran at a third length"
            )
        return worst

    def _generate(self, visit: _Visit) -> _Finding:
        expected = self._expected_generation
        got = visit.run(partial(generate, inputs=self.prompts.first))
        differ = (got.sequences != expected.sequences)[0, -NEW_TOKENS:].nonzero()
        if not len(differ):
            return _Finding()
        step = int(differ[0])
        logits = expected.logits[step][0]
        allowed = self._expected_prefills[0][1]
        gap = float(logits.max() - logits[got.sequences[0, step - NEW_TOKENS]])
        if gap <= 2 * allowed:
            return _Finding(note=f"token {step + 1} is a tie in eager, within the tolerance, and fell the other way")
        return _Finding(f"token {step + 1} of {NEW_TOKENS} differs from eager's", gap, 2 * allowed)

    def _sparse(self, visit: _Visit) -> _Finding:
        logits = visit.run(partial(prefill, inputs=self.prompts.longest))
        if not logits.isfinite().all():
            return _Finding("logits with NaN or infinity")
        told = stats(visit.model)
        if len(told) != visit.rewritten[-1]:
            return _Finding(f"mmcompile.stats tells of {len(told)} of {visit.rewritten[-1]} rewritten attentions")
        if not all(0 < site.density <= 1 + 1e-6 for site in told):
            return _Finding(f"mmcompile.stats tells of densities {[site.density for site in told]}")
        return _Finding(note=f"mean density {sum(site.density for site in told) / len(told):.2g}" if told else "")


@dataclass(frozen=True)
class _Finding:
    """fault: what is wrong, empty where nothing is. note: what is worth telling all the same."""

    fault: str = ""
    error: float | None = None
    allowed: float | None = None
    note: str = ""

    def but(self, fault: str) -> _Finding:
        return _Finding(fault, self.error, self.allowed, self.note)


class _Visit:
    """A compiled model, what its graphs do, and how many rewritten attentions each run of it went through."""

    def __init__(self, model: nn.Module, watch: Watch) -> None:
        self.model, self.watch = model, watch

    @property
    def rewritten(self) -> list[int]:
        return self.watch.rewritten

    def run(self, call: Callable[[nn.Module], Any]) -> Any:
        self.watch.rewritten.append(0)
        return call(self.model)


def _compare(got: torch.Tensor, expected: torch.Tensor, allowed: float) -> _Finding:
    if got.shape != expected.shape:
        return _Finding(f"logits of shape {list(got.shape)}, not {list(expected.shape)}")
    error = _distance(got, expected)
    # Written so that NaN is a fault.
    return _Finding("" if error <= allowed else f"logits differ by {error:.1e}", error, allowed)


def _distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).abs().max())


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no message"
