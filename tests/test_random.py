"""Random configurations: the layers against the reference, and one bit pattern for every route."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastcell
from support import CELLS, Case, Problem, assert_same_bits, away_from_the_kink, threads

pytestmark = pytest.mark.usefixtures("poison")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    cell = draw(st.sampled_from(CELLS))
    form = draw(st.sampled_from(["padded", "sorted", "ragged", "unbatched"]))
    hidden = draw(st.integers(1, 70))
    return Case(
        cell,
        draw(st.sampled_from([torch.float32, torch.float64])),
        draw(st.integers(1, 3)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        cell == "lstm" and hidden > 1 and draw(st.booleans()),
        form,
        draw(st.booleans()),
        draw(st.integers(1, 12)),
        1 if form == "unbatched" else draw(st.integers(1, 20)),
        draw(st.integers(1, 70)),
        hidden,
        draw(st.integers(0, 1000)),
    )


# The fixture outlives an example, which changes nothing for the next.
RELAXED = [HealthCheck.function_scoped_fixture]


@settings(max_examples=80, suppress_health_check=RELAXED)
@given(cases())
def test_equals_the_reference(case):
    problem = Problem(away_from_the_kink(case))
    problem.assert_close(problem.run(problem.layer(fastcell)), problem.truth())


@settings(max_examples=40, suppress_health_check=RELAXED)
@given(cases(), st.integers(2, 4))
def test_same_bits_with_any_number_of_threads(case, count):
    problem = Problem(case._replace(T=4 * case.T))  # enough work to be shared out
    with threads(1):
        alone = problem.run(problem.layer(fastcell))
    with threads(count):
        assert_same_bits(problem.run(problem.layer(fastcell)), alone)


@settings(max_examples=40, suppress_health_check=RELAXED)
@given(cases(), st.data())
def test_same_bits_for_any_part_of_the_batch(case, data):
    """Some of the samples, in another order, with what is left of their lengths' maximum."""
    problem = Problem(case)
    whole = problem.run(problem.layer(fastcell))
    chosen = data.draw(st.lists(st.integers(0, case.B - 1), min_size=1, max_size=case.B))
    form = "unbatched" if case.form == "unbatched" else "ragged" if case.packed else "padded"
    part = problem.samples(chosen, form)
    found = part.run(part.layer(fastcell))
    for name, value in found.items():
        if name.startswith(("gradient of weight", "gradient of bias")):
            continue  # sums over the batch
        expected = whole[name]
        if case.form != "unbatched":
            batch = 0 if case.batch_first and name in ("output", "gradient of x") else 1
            expected = expected.index_select(batch, torch.tensor(chosen))
            if batch == 0 or name in ("output", "gradient of x"):
                expected = expected.narrow(1 - batch, 0, part.case.T)
        assert_same_bits({name: value}, {name: expected})
