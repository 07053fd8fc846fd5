"""The benchmarks: each still runs, on tiny sizes, and measures what it says."""
import sys
from types import SimpleNamespace

import pytest
import torch

import train
from bench import fused, gpu, growth, peers, step
from data.responses import response_logps, sft_responses
from data.run.options import prepare
from pretend_gpu import PretendGPU
from processes import without_figures


@pytest.fixture(scope="module")
def stages():
    return step.stages(1, **step.QUICK)


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """Nothing is compiled and no picture is drawn: they would take longer than all the rest."""
    monkeypatch.setattr("spin_loss.compiled", lambda body, device: body)
    without_figures(monkeypatch)


def table(capsys):
    """{first cell: the others} of the Markdown tables printed."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    return {first: others for first, *others in rows}


def test_steps(stages, monkeypatch, capsys):
    monkeypatch.setattr(step, "stages", lambda *_, **__: stages)
    step.main(quick=True)
    rows = table(capsys)
    for name in ("SFT", "iteration 1"):
        tokens, places, ms, operations, waits = map(float, rows[name])
        assert 0 < tokens < 2 * places and ms > 0 and operations > 100 and waits == 1


@pytest.mark.parametrize("t", [0, 1])
def test_a_part_of_a_step_takes_about_200_operations(t):
    """At the default sizes, in SFT and against a fresh model; a step reads a few parts."""
    config = train.Config(device="cpu", sft_samples=64, negatives=2, batch_size=128)
    world, _ = prepare(config)
    policy, run = train.new_policy(world, config), SimpleNamespace(config=config, world=world)
    responses = train.self_play(policy, 0, run) if t else sft_responses(world)
    operations = step.step_operations(step.Stage(t, config, world, policy, responses))
    third = train.prompt_batches(world.splits["train"], 3, config, t)[2]
    parts = len(list(responses.parts(third)))
    assert operations["aten::_fused_adam_"] == 1 and operations.total() > 100, "a whole step"
    assert operations.total() <= 100 + 200 * parts, operations.most_common(12)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_fused(capsys):
    fused.main(quick=True)
    rows = table(capsys)
    assert all(float(x) > 0 for way in ("eager", "fused") for x in rows[way][:2])


@pytest.mark.skipif(sys.platform == "win32", reason="needs os.wait4")
def test_growth(capsys):
    growth.main(["length 60"], quick=True)
    assert all(float(x) > 0 for x in table(capsys)["length 60"][1:])


def test_the_table_of_a_gpu_on_a_pretended_one(monkeypatch, capsys, stages):
    monkeypatch.setattr(gpu, "stages", lambda *_, **__: stages)
    monkeypatch.setattr(gpu, "QUICK", step.QUICK | {"iters": 1})
    for name, value in dict(reset_peak_memory_stats=None, max_memory_allocated=1, synchronize=None,
                            memory_allocated=0, get_device_name="pretended",
                            set_sync_debug_mode=None).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    with PretendGPU():
        gpu.main(quick=True)
    rows = table(capsys)
    on_gpu, on_cpu = rows["KL after SFT and each iteration"]
    assert float(on_gpu.split(", ")[1]) == pytest.approx(float(on_cpu.split(", ")[1]), rel=0.05)
    assert int(rows["a step of SPIN, operations"][0]) > 100


# --- other people's code -------------------------------------------------------------------------

def test_the_careful_loop_has_our_log_probs(stages):
    """transformers' GPT-2 is replaced by ours, with its interface."""
    policy, world, responses = stages[1].policy, stages[1].world, stages[1].responses
    theirs = SimpleNamespace(
        transformer=lambda tokens, use_cache: SimpleNamespace(
            last_hidden_state=policy.hidden(tokens)),
        lm_head=SimpleNamespace(weight=policy.head_weight))
    rows = [(world.prompts[9], list(y)) for y in responses.tables[9].responses]
    (part,) = responses.parts([9])
    with torch.no_grad():
        torch.testing.assert_close(peers.hf_logps(theirs, rows), response_logps(policy, part)[0],
                                   rtol=1e-4, atol=1e-4)


def test_all_contenders_have_the_same_pairs(stages):
    stage, config = stages[1], stages[1].config
    samples = peers.train.sample_responses(stage.policy, stage.world, config, 0)
    pairs = peers.pairs_of(stage.world, config, samples)
    assert {len(some) for some in pairs} == {config.negatives}
    for some in (pairs, peers.one_pair_each(pairs)):
        assert peers.ours(stage, some, 1000)() > 0
    assert all(y != other for some in peers.one_pair_each(pairs) for _, y, other in some)
