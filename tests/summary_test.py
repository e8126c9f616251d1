"""What is made of an ablation's runs: speed-ups, the cost model, the gate, pictures."""

import dataclasses
import struct

import ablations
import pytest

from ds4jax.experiments import figures, summary
from ds4jax.experiments.ablation_report import render
from ds4jax.experiments.arms import ONE_ROW, PLAIN, Arm, Settings, arms

CONTINUOUS = Arm("continuous", 1)


def find(found, arm, text="copy"):
    return next(one for one in found if (one.arm, one.text) == (arm, text))


def test_speedups_are_over_the_faster_plain_and_follow_the_cost_model():
    """Times are made by the model, so it predicts what is measured.

    Seen red with the first round counted, and with the exact class as the reference.
    """
    found = summary.summarise(ablations.runs())
    one = find(found, "continuous 1")
    assert one.cost.r == pytest.approx(1.5) and one.cost.d == pytest.approx(0.2)
    assert one.alpha == pytest.approx(0.8)
    assert one.reads_per_token == pytest.approx(1 / 1.8)
    assert one.predicted == pytest.approx(1.8 / 1.7)
    assert one.speedup.median == pytest.approx(1.8 / 1.7)
    assert one.speedup.count == 3 * 2
    assert one.cost.break_even == pytest.approx(0.7)
    deep = find(found, "chained 2", "prose")
    assert deep.cost.base == 2 and deep.cost.r == pytest.approx(3)
    assert deep.accepted_per_cycle == pytest.approx(1.2)
    assert deep.predicted == pytest.approx(3.2 / 3.4) == deep.speedup.median
    assert find(found, PLAIN.name).speedup.median == pytest.approx(1 / 1.5)
    assert find(found, ONE_ROW.name).speedup.median == 1


def test_other_tokens_are_told():
    runs = ablations.runs()
    runs[-1] = dataclasses.replace(runs[-1], sha256="f" * 64, worst_gap=0.25)
    found = summary.summarise(runs)
    assert [one.arm for one in found if not one.same] == [runs[-1].arm]
    assert "others" in render(runs) and "0.25" in render(runs)


@pytest.mark.parametrize("slower, holds", [(1.019, True), (1.021, False)])
def test_the_gate_is_held_to_the_better_of_plain_and_ungated(slower, holds):
    """Here the ungated arm is better on one text, and plain on the other."""
    gated = Arm("continuous", 1, gate=True)
    runs = []
    for number in range(4):
        for text, ungated in (("copy", 1.0), ("prose", 3.0)):
            seconds = {
                PLAIN: 2.0, ONE_ROW: 1.5, CONTINUOUS: ungated,
                gated: slower * min(ungated, 2.0),
            }  # fmt: skip
            runs += [
                ablations.run(arm, text, number=number, seconds=time)
                for arm, time in seconds.items()
            ]
    copy, prose = summary.check_gates(runs)
    assert (copy.better, prose.better) == ("continuous 1", "plain")
    assert copy.slower.median == pytest.approx(slower - 1)
    assert prose.slower_than_one_row.median == pytest.approx(slower * 2 / 1.5 - 1)
    assert copy.holds == prose.holds == holds
    assert ("| NO |" in render(runs)) != holds


def test_what_the_gate_costs_by_counters():
    """A cycle takes 17 / 15 of a plain pass; half of the gated ones do not draft."""
    gated = Arm("continuous", 1, gate=True)
    found = []
    for accepted in (32, 0):
        counters = dict(accepted_1=accepted, tokens=40 + accepted)
        half = counters | dict(drafted_1=20)
        arms = {PLAIN: {}, ONE_ROW: {}, CONTINUOUS: counters, gated: half}
        runs = [ablations.run(arm, **changes) for arm, changes in arms.items()]
        found += [check.by_counters for check in summary.check_gates(runs)]
    cycle = 17 / 15
    mean = (cycle + 1) / 2
    assert found == pytest.approx([mean / cycle - 1, mean - 1])


def test_the_report_has_every_arm_and_where_it_was_made():
    page = render(ablations.runs())
    for arm in arms(ablations.SETTINGS):
        assert f"| {arm.name} |" in page
    for words in ("a CPU", "0.11.2", "0123456789ab", "- tokens: 100", "speedup.png"):
        assert words in page
    # Every row of a table has its heads.
    for line in page.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_figures_are_pngs(tmp_path):
    figures.draw(ablations.runs(), tmp_path)
    for name in figures.FIGURES:
        content = (tmp_path / name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert width > 600 and height > 300
    assert len(list(tmp_path.iterdir())) == len(figures.FIGURES)


def test_arms_are_alone_or_crossed():
    settings = ablations.SETTINGS
    names = [arm.name for arm in arms(settings)]
    assert names == [
        "plain", "plain one-row", "continuous 1", "continuous 2", "chained 1",
        "chained 2", "continuous 1 ds4-pairing", "continuous 1 gate",
    ]  # fmt: skip
    crossed = arms(dataclasses.replace(settings, cross=True))
    assert len(crossed) == 2 + 2 * 2 * 2 * 2 == len(set(crossed))
    assert len({arm.name for arm in crossed}) == len(crossed)
    plain = dataclasses.replace(settings, depths=(0,))
    assert arms(plain) == (PLAIN, ONE_ROW)


def test_words_of_a_config_may_be_joined():
    config = {"texts": ("copy,prose",), "depths": (0, 2), "modes": "chained"}
    settings = Settings.of(config)
    assert settings.texts == ("copy", "prose") and settings.modes == ("chained",)
    assert Settings.of({}) == Settings()


def test_each_pairing_has_a_least_of_its_own_or_all_the_same():
    def found(*least):
        settings = Settings(pairings=("trained", "ds4"), gate_least=least)
        for pairing in settings.pairings:
            arm = Arm("continuous", 1, pairing=pairing, gate=True)
            gate = arm.decoding(settings).gate
            assert gate is not None
            yield gate.least

    assert list(found(0.6, 0.75)) == [0.6, 0.75]
    assert list(found(0.6)) == [0.6, 0.6]
