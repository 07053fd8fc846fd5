"""What the study and the claims share: one run, kept in a file, and the tables that runs fill.

    run_all([Job({"lam": 5.0, "seed": 0}), …], out)   train what is not in `out` yet
    rows_of(job, out, "heldout")                      its metrics after SFT, after iteration 1, …

A run is train.main without a folder, pictures and printed lines: `play` below. Runs of one seed and
one SFT set share their SFT model. What train.py has no flag for is a `Variant`, a function or two
that `play` hands to `train.fit`.

Reading order: the variants → `Record`, `play`, one run → `Job`, `run_all` → the tables.
Dimensions: P prompts with a table of N responses each. KL and losses in nats.
"""
import contextlib
import json
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import numpy as np  # noqa: E402  (the line above makes the project importable)
import torch  # noqa: E402

import train  # noqa: E402
from data import InputError  # noqa: E402
from data.metrics import evaluate  # noqa: E402
from data.responses import response_logps, self_play_responses, sft_responses  # noqa: E402
from data.run.folder import is_due  # noqa: E402
from data.run.options import flag_of, prepare  # noqa: E402
from data.world import WORLD  # noqa: E402
from spin_loss import mass_anchor, spin_loss  # noqa: E402


# --- what train.py has no flag for ---------------------------------------------------------------

@dataclass
class Variant:
    """Another way to play. objective_for(responses, run, t) makes the objective of iteration t."""
    about: str
    objective_for: callable = None
    self_play: callable = train.self_play
    torch: dict = field(default_factory=dict)  # {name of a class of torch: what train.fit takes}


def weighted_loss(player_PN, part, weight_PNN, config):
    """Σ weight · ℓ(y, y') for each prompt, and the mass anchor if it is asked for. [P]"""
    loss_PNN = spin_loss(player_PN[:, :, None], player_PN[:, None, :], part.opponent_PN[:, :, None],
                         part.opponent_PN[:, None, :], config.lam, config.loss)
    loss_P = (weight_PNN * loss_PNN).sum(dim=(1, 2))
    if config.anchor == "mass":
        loss_P = loss_P + config.anchor_weight * mass_anchor(player_PN, part.opponent_PN,
                                                             part.log_share_PN)
    return loss_P


def dpo_objective(player, part, config):
    """DPO: y and y' are both p_t's; an oracle judge prefers the one that p_data prefers."""
    better_PNN = part.data_PN[:, :, None] > part.data_PN[:, None, :]
    weight_PNN = part.generated_PN[:, :, None] * part.generated_PN[:, None, :] * better_PNN
    # The mean over the pairs that the judge ranks; where there is hardly any, it counts for little.
    weight_PNN = weight_PNN / weight_PNN.sum(dim=(1, 2), keepdim=True).clamp(min=1e-3)
    return weighted_loss(response_logps(player, part, config.logprob), part, weight_PNN, config)


def one_for_each(responses, run, t):
    """Each sampled y' is compared with one y, drawn from the SFT set once for the iteration."""
    rng = np.random.default_rng(train.seed_for(run.config.seed, t, 2))
    pairs = {}  # {prompt: the weight of each pair (y, y'), [N, N]}
    for p in run.world.splits["train"]:
        table = responses.tables[p]
        count_N = np.rint(table.sampled_N * run.config.negatives).astype(int)
        columns = [rng.multinomial(count, table.real_N / table.real_N.sum()) for count in count_N]
        pairs[p] = torch.from_numpy(np.stack(columns, axis=1) / run.config.negatives).float()

    def objective(player, part, config):
        player_PN = response_logps(player, part, config.logprob)
        P, N = player_PN.shape
        weight_PNN = player_PN.new_zeros(P, N, N)
        for i, p in enumerate(part.prompts):
            weight_PNN[i, :len(pairs[p]), :len(pairs[p])] = pairs[p]
        return weighted_loss(player_PN, part, weight_PNN, config)
    return objective


def with_history(opponent, t, run):
    """y' of this iteration and of the one before, as many of each: the authors' history."""
    samples = train.sample_responses(opponent, run.world, run.config, t)
    older, run.older = getattr(run, "older", samples), samples
    both = [new + old for new, old in zip(samples, older)]
    return self_play_responses(run.world, both, opponent, run.config)


def lam_5_at_last(responses, run, t):
    """λ = 5 in the last iteration."""
    def objective(player, part, config):
        lam = 5.0 if t + 1 == config.iters else config.lam
        return train.spin_objective(player, part, replace(config, lam=lam))
    return objective


RMSPROP = {"torch.optim.Adam": lambda weights, lr, betas, fused: torch.optim.RMSprop(
    weights, lr, alpha=betas[1])}
LEVEL = {"torch.optim.lr_scheduler.LambdaLR": lambda optimizer, _: (
    torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0))}
VARIANTS = {
    "": Variant(""),
    "dpo": Variant("an oracle judge ranks two responses of p_0", lambda *_: dpo_objective),
    "one": Variant("one y for each y'", one_for_each),
    "rmsprop": Variant("RMSprop", torch=RMSPROP),
    "level": Variant("the rate stays level", torch=LEVEL),
    "authors": Variant("λ = 5 in the last iteration, RMSprop, also the y' of the iteration before",
                       lam_5_at_last, with_history, RMSPROP),
}


# --- one run -------------------------------------------------------------------------------------

class Record:
    """What `train.fit` wants of a run: settings and world, and a report now and then."""
    def __init__(self, config):
        self.config, self.rows = config, []
        self.world, self.device = prepare(config)

    def restore(self, learner):
        return 0  # no step is done yet

    def report(self, t, step, steps, responses, learner):
        """Keep the metrics of both splits."""
        if not is_due(step, steps, self.config.reports):
            return
        found = evaluate(learner[0], responses, self.world, self.config, t)
        for split, more in parts_of(learner[0], responses, self.world).items():
            numbers = {name: found[split][name] for name in (
                "kl", "off_support", "predicted_tv", "loss", "logp_real", "logp_generated")}
            self.rows.append({"iteration": t, "step": step, "split": split, **numbers, **more})


@torch.no_grad()
def parts_of(policy, responses, world) -> dict:
    """For each split: kl_wrong, what wrong responses add to KL(p_data‖p_θ), and the probability of
    the responses in the SFT set.

    KL(p_data‖p_θ) = −log p_θ(right) + KL(p_data‖p_θ(·|right)), where p_θ(right) is the probability
    of all right responses: the first term is kl_wrong, and the second is due to their proportions.
    """
    kl_P, seen_P = np.empty(len(world.prompts)), np.empty(len(world.prompts))
    for part in responses.parts(range(len(world.prompts)), policy.head_weight.device):
        p_PN = response_logps(policy, part).double().exp() * (part.data_PN > 0)
        kl_P[part.prompts] = -p_PN.sum(dim=1).log().cpu()
        seen_P[part.prompts] = (p_PN * (part.real_PN > 0)).sum(dim=1).cpu()
    return {split: {"kl_wrong": float(kl_P[prompts].mean()), "seen": float(seen_P[prompts].mean())}
            for split, prompts in world.splits.items()}


def play(config, variant=VARIANTS[""], starts=None) -> list[dict]:
    """Algorithm 1, as in train.main, without a folder; returns the rows of metrics.

    starts: a folder of SFT models that runs share.
    """
    run = Record(config)
    first = policy = first_policy(run, starts)
    for t in range(config.iters):
        opponent = policy if config.opponent == "previous" else first
        responses = variant.self_play(opponent, t, run)
        objective = train.OBJECTIVES[config.method]
        if variant.objective_for:
            objective = variant.objective_for(responses, run, t)
        with contextlib.ExitStack() as stack:
            for name, other in variant.torch.items():
                stack.enter_context(mock.patch(name, other))
            policy = train.fit(policy, objective, responses, t + 1, run)
    return run.rows


def first_policy(run, starts):
    """p_0, by SFT or from a run that began alike."""
    config, policy = run.config, train.new_policy(run.world, run.config)
    same = [Path(config.data).stem, config.sft_samples, config.seed, config.prompts_a_step(),
            config.sft_steps, config.n_embd]
    path = starts and Path(starts) / f"sft_{'_'.join(map(str, same))}.pt"
    if path and path.exists():
        saved = torch.load(path)
        policy.load_state_dict(saved["model"])
        run.rows = saved["rows"]
        return policy
    policy = train.fit(policy, train.sft_objective, sft_responses(run.world), 0, run)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": policy.state_dict(), "rows": run.rows}, path)
    return policy


# --- many runs -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Job:
    """A run: settings that differ from train.Config's defaults, and a variant's name."""
    settings: dict = field(default_factory=dict)
    variant: str = ""

    def __or__(self, more: dict):
        return replace(self, settings=self.settings | more)

    def changed(self) -> dict:
        return {name: value for name, value in sorted(self.settings.items())
                if value != getattr(train.Config, name)}

    def path(self, out) -> Path:
        """The file of its rows: its name is what the run changes, so that none is made twice."""
        changed = [f"{name}-{Path(value).stem if name == 'data' else value}"
                   for name, value in self.changed().items()]
        name = "_".join([*changed, self.variant]).strip("_") or "run"
        return Path(out) / f"{name}.json"

    def command(self) -> str:
        """What to type for this run with seed 0, and what there is no flag for."""
        flags = [f" {flag_of(name)} {value:g}" if isinstance(value, float) else
                 f" {flag_of(name)} {value}" for name, value in self.changed().items()
                 if name not in ("seed", "reports")]
        about = VARIANTS[self.variant].about
        return f"`python train.py{''.join(flags)}`" + (f", {about}" if about else "")


def run_all(jobs, out, what):
    """Train the runs that are not in `out` yet, one after the other, and keep their rows there."""
    jobs = [job for job in {job.path(out): job for job in jobs}.values()
            if not job.path(out).exists()]
    Path(out).mkdir(parents=True, exist_ok=True)
    for i, job in enumerate(jobs, 1):
        clock, found = time.process_time(), {"rows": [], "stopped": ""}
        config = train.Config(**{"device": "cpu", "reports": 1} | job.settings)
        try:
            with contextlib.redirect_stdout(None):
                found["rows"] = play(config, VARIANTS[job.variant], Path(out).parent / "sft")
        except InputError as error:  # a gradient that is not finite is a result: it is reported
            found["stopped"] = str(error)
        found["cpu"] = time.process_time() - clock
        job.path(out).write_text(json.dumps(found), encoding="utf-8")
        print(f"{what} {i}/{len(jobs)}  {job.path(out).stem}  {found['stopped']}", flush=True)


def rows_of(job, out, split="train", last=True) -> list[dict]:
    """The metrics after SFT and after each iteration, or all reports of a run."""
    rows = json.loads(job.path(out).read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if row["split"] == split]
    for row in rows:
        row["proportions"] = row["kl"] - row["kl_wrong"]
    return list({row["iteration"]: row for row in rows}.values()) if last else rows


def minutes(jobs, out) -> float:
    """Processor time of some runs."""
    paths = {job.path(out) for job in jobs}
    return sum(json.loads(path.read_text(encoding="utf-8"))["cpu"] for path in paths) / 60


# --- tables --------------------------------------------------------------------------------------

def values(jobs, out, key, t, split="train") -> list[float]:
    """One number after iteration t (−1: the last) of each run that came so far."""
    rows = [rows_of(job, out, split) for job in jobs]
    return [some[t][key] for some in rows if len(some) > t]


def spread(numbers, form=".3f") -> str:
    """Mean and range.

    >>> spread([0.5, 0.7])
    '0.600 (0.500–0.700)'
    """
    mean, low, high = (format(f(numbers), form) for f in (statistics.mean, min, max))
    return mean if len(numbers) == 1 else f"{mean} ({low}–{high})"


def table(head, rows) -> str:
    """A Markdown table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + "\n"


# --- a small world, to see whether everything runs -----------------------------------------------

QUICK = dict(n_layer=1, n_head=2, n_embd=32, negatives=4, batch_size=24, iters=2, sft_steps=60,
             sft_lr=1e-2, steps=4)


def small_world(out) -> str:
    """A file with every eighth row of the world, both splits among them."""
    path = Path(out) / "small.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = WORLD.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[::8]), encoding="utf-8")
    return str(path)
