"""BRAIn: Bayesian reward-conditioned amortized inference, in one file (arXiv 2402.02479).

Condition the supervised model p(y|x) on "this answer is good" (G = 1). Bayes' rule and a
Bradley-Terry reward model r give the posterior p(y|x, G=1) ∝ p(y|x)·exp(r(x, y)/kl_coef), the
optimum of E_q[r] − kl_coef·KL(q‖p). It can be weighed but not sampled from, so distil it: draw n
answers to a prompt from a proposal q′ (the policy of a moment ago), weigh them by self-normalised
importance sampling (SNIS) and step the policy q_θ on KL(α̂ ‖ β̂), where

    α̂ = softmax(log p + r/kl_coef − log q′)   is the posterior's share of each of the n answers,
    β̂ = softmax(log q_θ − log q′)             the policy's share, a self-normalised baseline, and
    −Σᵢ (α̂ᵢ − β̂ᵢ) ∇log q_θ(yᵢ)                the gradient: exactly 0 once the policy is right.

Legend: B prompts, n responses to each, P prompt and R response tokens, V vocabulary.
    log_prior   p, the supervised (SFT) model     log_proposal  q′, which sampled the responses
    log_policy  q_θ, the model being trained      reward        r(x, y), from the reward model
    A log-probability is of a whole response, in nats, summed over its tokens with end-of-text.

Stages of `python brain.py --task toy|tldr|hh|jsonl`; a checkpoint that is given skips its stage:
    1 sft     fine-tune --base on the references               out/TASK/prior,  or --prior
    2 reward  train a reward model on the comparisons          out/TASK/reward, or --reward
    3 brain   3.1 sample  3.2 score  3.3 weigh  3.4 step       out/TASK/policy
    4 eval    fresh samples on held-out prompts                out/TASK/report.md

Departures from the paper: (1) its hyper-parameters could not be reached, the defaults are our own;
(2) log q′ is the policy's score of the samples, not the sampler's own, so rounding cancels in β̂;
(3) a response without end-of-text pays missing_eos_penalty; (4) sft averages nats over tokens."""

import contextlib, copy, functools, gzip, inspect, itertools, json  # noqa: E401, I001
import math, os, pickle, random, re, shutil, sys, time, zlib  # noqa: E401
from collections import Counter, namedtuple
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import errors, file_download, utils
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

@dataclass(frozen=True)
class Config:
    """A run. Each field is a flag, its comment the flag's help; default < task's preset < flag."""
    task: Literal["toy", "tldr", "hh", "jsonl"] = "toy"  # what to learn, from which files
    base: str | None = None  # hub name or folder of a model to fine-tune into the prior
    prior: str | None = None  # hub name or folder of a supervised model: skips stage 1
    reward: str | None = None  # hub name or folder of a reward model: skips stage 2
    data_dir: str | None = None  # where the data files lie, and where downloads go
    hh_subsets: list[str] = field(default_factory="harmless-base helpful-base".split)  # HH folders
    out: str | None = None  # the run's folder; out/TASK by default
    overwrite: bool = False  # replace the run in --out by a fresh one
    check: bool = False  # print the derivation checks, nothing else
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    seed: int = 0  # reaches every draw
    max_prompt_tokens: int = 512  # longer prompts are cut (tldr) or skipped
    max_response_tokens: int = 128  # limit of sampling and of sft, end-of-text included
    max_comparison_tokens: int = 256  # limit of the responses that train a reward model
    temperature: float = 1.0  # after sft, every model is softmax(logits / temperature)
    missing_eos_penalty: float = 1.0  # reward units, off a response without end-of-text
    sft_lr: float = 1e-5  # first learning rate of stage 1; each decays linearly to 0
    sft_batch: int = 64  # references a step
    sft_epochs: int = 1  # passes over the references
    reward_lr: float = 3e-6  # first learning rate of stage 2
    reward_batch: int = 64  # pairs a step
    reward_epochs: int = 1  # passes over the comparisons
    lr: float = 1e-6  # first learning rate of stage 3
    steps: int = 1000  # optimizer steps of stage 3
    samples_per_prompt: int = 8  # n, at least 2
    prompts_per_step: int = 32  # prompts a step of stage 3
    prompts_per_refresh: int = 128  # prompts sampled at a time: a multiple of the above
    kl_coef: float = 0.5  # reward units that a nat of KL to the prior costs; small is greedy
    target: Literal["posterior", "argmax"] = "posterior"  # alpha: the posterior, or the best sample
    baseline: Literal["none", "unnormalized", "self_normalized"] = "self_normalized"  # see README
    divergence: Literal["forward", "reverse"] = "forward"  # KL(alpha||beta), or KL(beta||alpha)
    proposal: Literal["lagged", "prior"] = "lagged"  # who samples: the policy, or the prior
    max_grad_norm: float = 1.0  # larger gradients are scaled down to this norm
    micro_batch_tokens: int = 16384  # tokens a forward pass; lower it if memory runs out
    save_every: int = 0  # steps between saved states; 0: ten minutes
    eval_prompts: int = 256  # held-out prompts of the evaluation, at least 2
    eval_samples: int = 4  # responses to each of them, at least 2
# Presets hold differences only; those of tldr and hh are for 1B checkpoints on one H100 or H200.
PRESETS = {
    "toy": dict(max_prompt_tokens=16, max_response_tokens=4, max_comparison_tokens=4, kl_coef=0.4,
                sft_lr=3e-3, sft_epochs=4, reward_lr=1e-3, reward_epochs=4, lr=2e-3, steps=400,
                prompts_per_step=32, prompts_per_refresh=64, save_every=50),
    "tldr": dict(prior="cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr", data_dir="data/tldr",
                 reward="cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr", temperature=0.7,
                 max_response_tokens=53, max_comparison_tokens=169, sft_lr=3e-6, sft_batch=128),
    "hh": dict(prior="lomahony/eleuther-pythia1b-hh-sft", data_dir="data/hh-rlhf")}

# ---- The paper: pure functions of (B, n) log-probabilities and rewards, in their own dtype ------
BRAIN = "posterior", "self_normalized"  # target and baseline, the only ones with a reverse
Weights = namedtuple("Weights", "alpha_hat beta_hat")  # shares of the n samples, rows sum to 1

def snis_weights(log_policy: Tensor, log_prior: Tensor, log_proposal: Tensor, reward: Tensor,
                 kl_coef: float, target: str = "posterior") -> Weights:
    """Self-normalised importance weights, α̂ of the posterior, β̂ of the policy (section 4).
    Takes four (B, n) tensors: log-probabilities of whole responses in nats, and rewards in the
    reward model's units. Raises ValueError for unequal shapes, kl_coef ≤ 0 or an unknown target."""
    if not log_policy.shape == log_prior.shape == log_proposal.shape == reward.shape:
        raise ValueError("log_policy, log_prior, log_proposal and reward need one shape, (B, n)")
    if not kl_coef > 0:
        raise ValueError(f"kl_coef must be positive, not {kl_coef}")
    if target == "posterior":  # p(y|x, G=1) ∝ p(y|x)·exp(r/kl_coef), over q′; Z(x) cancels
        alpha_hat = (log_prior + reward / kl_coef - log_proposal).softmax(-1)  # (B, n)
    elif target == "argmax":  # kl_coef → 0: all weight on the highest reward, shared among ties
        best = (reward == reward.amax(-1, keepdim=True)).to(reward)  # (B, n)
        alpha_hat = best / best.sum(-1, keepdim=True)
    else:
        raise ValueError(f"target must be posterior or argmax, not {target!r}")
    return Weights(alpha_hat, (log_policy - log_proposal).softmax(-1))  # (B, n) each

def brain_loss(log_policy: Tensor, log_prior: Tensor, log_proposal: Tensor, reward: Tensor,
               kl_coef: float, *, target: str = "posterior", baseline: str = "self_normalized",
               divergence: str = "forward") -> tuple[Tensor, Weights]:
    """BRAIn's loss, KL(α̂ ‖ β̂) by default, per prompt (B,) in nats, and the detached weights.
    Differentiable in log_policy alone, with gradient −Σᵢ (α̂ᵢ − bᵢ) ∇log q_θ(yᵢ). The baseline
    b = ∂A/∂log q_θ(yᵢ), which is 0, exp(ρᵢ)/n or β̂ᵢ, comes of a term A(ρ) that estimates log of
    Σ_y q_θ(y|x) = 1. Divergence "reverse" is KL(β̂ ‖ α̂), the policy-gradient side. Inputs and
    errors: snis_weights; an unknown dial, or reverse with another dial turned: ValueError, too."""
    log_prior, log_proposal, reward = log_prior.detach(), log_proposal.detach(), reward.detach()
    alpha, beta = snis_weights(log_policy, log_prior, log_proposal, reward, kl_coef, target)
    rho, n = log_policy - log_proposal, reward.shape[-1]  # (B, n) ρ = log q_θ − log q′
    normaliser = {"none": torch.zeros_like(rho[..., 0]),  # A(ρ), (B,): DPG
                  "unnormalized": rho.exp().mean(-1) - 1,  # the log, linear at 1: GDC++
                  "self_normalized": rho.logsumexp(-1) - math.log(n)}  # the log: BRAIn
    if divergence == "forward" and baseline in normaliser:  # with 0·log 0 = 0
        loss = (torch.xlogy(alpha, n * alpha) - alpha * rho).sum(-1) + normaliser[baseline]
    elif divergence == "reverse" and (target, baseline) == BRAIN:
        log_alpha = (log_prior + reward / kl_coef - log_proposal).log_softmax(-1)  # (B, n)
        loss = (beta * (rho.log_softmax(-1) - log_alpha)).sum(-1)  # (B,)
    else:
        raise ValueError(f"no loss has {target=}, {baseline=}, {divergence=}")
    return loss, Weights(alpha, beta.detach())

def bradley_terry_loss(reward_chosen: Tensor, reward_rejected: Tensor) -> Tensor:
    """−log P(chosen ≻ rejected) = −log σ(Δr) per pair (B,): P(y₁ ≻ y₂) = g₁/(g₁+g₂), g = exp(r)."""
    return -F.logsigmoid(reward_chosen - reward_rejected)  # (B,)

def effective_sample_size(weights: Tensor) -> Tensor:
    """Kish's 1/Σᵢwᵢ² per prompt (B,) of weights (B, n) that sum to 1: between 1 and n."""
    return 1 / weights.square().sum(-1)

# ---- Command line, and errors told in one line --------------------------------------------------
class BadInput(ValueError):
    """A user's mistake: exit status 2."""
class Halt(Exception):
    """A guard stopped the run, whose last state is kept: exit status 1."""
def refuse_if(wrong, why: str) -> None:
    if wrong:
        raise BadInput(why)
def bar(items, what: str, **options) -> tqdm:  # of progress; quiet where nobody looks
    return tqdm(items, what, disable=not sys.stdout.isatty(), **options)
ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError,
          EOFError, zlib.error, pickle.UnpicklingError, SafetensorError, errors.HTTPError)
@contextlib.contextmanager
def telling(what: str, kind=BadInput):  # one line for what files, checkpoints and disks do wrong
    try:
        yield
    except ERRORS as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise kind(f"{what}: {reason}") from error
def parse_config(argv: list[str] | None = None) -> Config:
    """The resolved configuration of a command line, or BadInput before anything is loaded."""
    parser = transformers.HfArgumentParser(Config, allow_abbrev=False, prog="brain.py")
    parser.error = functools.partial(refuse_if, True)  # not usage text and SystemExit
    comments = dict(re.findall(r" (\w+): .*  # (.*)", inspect.getsource(Config)))
    for action in parser._actions:  # --help shows the comments of Config
        action.help = comments.get(action.dest, action.help)
    given = parser.parse_args(argv)  # what the user said, without a preset
    preset = PRESETS.get(given.task, {}) | dict(out=f"out/{given.task}")
    parser.set_defaults(**preset | (dict(prior=None, reward=None) if given.base else {}))
    cfg = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]
    for name, value in asdict(cfg).items():
        least = 1 if type(value) is int else 1e-12
        least += name in ("samples_per_prompt", "eval_samples", "eval_prompts")  # for a variance
        least *= name not in ("seed", "save_every", "missing_eos_penalty")
        refuse_if(type(value) in (int, float) and not least <= value < 2**63,
                  f"--{name} must be positive and finite (at least {least}), not {value}")
    refuse_if(cfg.base and cfg.prior, "--base is made into the prior: give no --prior beside it")
    refuse_if(cfg.prompts_per_refresh % cfg.prompts_per_step,
              "--prompts_per_refresh must be a multiple of --prompts_per_step")
    refuse_if(cfg.divergence == "reverse" and (cfg.target, cfg.baseline) != BRAIN,
              f"--divergence reverse needs --target {BRAIN[0]} and --baseline {BRAIN[1]}")
    refuse_if(cfg.task != "toy" and not (cfg.base or cfg.prior), "--base or --prior is needed")
    refuse_if(cfg.task == "jsonl" and not cfg.data_dir, "--data_dir with train.jsonl is needed")
    return cfg

# ---- Data: four tasks, one Example --------------------------------------------------------------
TLDR_URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback"
HH_URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main"
POST, TLDR, TURN = "\n\nPOST: ", "\n\nTL;DR:", "\n\nAssistant:"
KEYS, FILLERS = "sun moon star rain".split(), "the a of in".split()
Example = namedtuple("Example", "prompt reference chosen rejected", defaults=[None] * 3)  # texts

def fetch(path: Path, url: str) -> Path:  # downloaded if absent: to a temporary name, resumed
    if not path.exists():
        with telling(f"{path} is absent (--data_dir names its folder), {url} cannot be fetched"):
            size = file_download.get_hf_file_metadata(url).size  # bytes, which http_get checks
            print(f"fetching {url}, {(size or 0) / 1e6:.1f} MB, to {path}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_name(path.name + ".part"), "ab") as part:
                file_download.http_get(url, part, resume_size=part.tell(), expected_size=size)
            Path(part.name).rename(path)
    return path
def read_lines(path: Path):  # yields (line, "file:line") of a .jsonl or .jsonl.gz file
    opener = gzip.open if path.suffix == ".gz" else open  # a truncated .gz is an error, too
    with telling(path), opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            yield line, f"{path}:{number}"
def text_at(row: dict, *keys: str | int) -> str:  # row[key][key]…, which must be text
    with telling(f"no text at {'.'.join(map(str, keys))}"):
        text = functools.reduce(lambda at, key: at[key], keys, row)
        return text.encode().decode()  # refuses what is no string, and lone surrogates
def parse_jsonl(row: dict) -> Example:  # a user's row, of Example's fields
    given = {key: text_at(row, key) for key in Example._fields if row.get(key) is not None}
    refuse_if(not given.get("prompt", "").strip() or ("chosen" in given) != ("rejected" in given),
              "a row needs a prompt, and chosen and rejected need each other")
    return Example(**given)
def parse_dialogue(row: dict) -> Example | None:  # of HH; None where prompts differ
    good, bad = (text_at(row, key).rpartition(TURN) for key in ("chosen", "rejected"))
    if good[:2] != bad[:2] or not (good[1] and good[2].strip() and bad[2].strip()):
        return None
    return Example(good[0] + TURN, good[2], good[2], bad[2])  # a response starts with a space
def parse_post(row: dict) -> Example | None:
    """A row of tldr_3_filtered or of the comparisons; None for news and for empty summaries."""
    info, choice, paths = row.get("info", row), row.get("choice"), [("summary",)]  # of a post
    if isinstance(info, dict) and "article" in info:
        return None
    subreddit, title, post = (text_at(info, key) for key in ("subreddit", "title", "post"))
    if info is not row:  # a comparison has no reference; the chosen summary comes first
        refuse_if(type(choice) is not int or choice not in (0, 1),
                  f"choice must be 0 or 1, not {choice!r}")
        paths = [("summaries", i, "text") for i in (choice, 1 - choice)]
    texts = [" " + text_at(row, *path).strip() for path in paths]  # one leading space
    prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}{POST}{post}{TLDR}"
    return None if " " in texts else Example(prompt, *[None] * (len(texts) - 1), *texts)
def shorten(prompt: str) -> str:  # less its post's last line, or last character; "" if none is left
    head, marker, post = prompt.removesuffix(TLDR).partition(POST)
    return head + marker + post[: post.rfind("\n")] + TLDR if post else ""
def toy_rows(rng: random.Random, rows: int):  # a good summary lists a post's key words once
    for _ in range(rows):
        keys = rng.sample(KEYS, rng.randint(1, 3))  # what the post is about
        words = rng.sample(keys + rng.choices(FILLERS, k=6 - len(keys)), 6)
        drafts = [rng.sample(keys, len(keys)) for _ in range(3)]  # reference, chosen, rejected
        for draft in drafts * 2:  # people slip: a word too many, a wrong one, or one for two
            if rng.random() < 0.5:
                at = rng.randrange(len(draft))
                draft[at : at + rng.choice([0, 1, 2])] = [rng.choice(KEYS + FILLERS)]
        worth = [2 * len(set(draft) & set(keys)) - len(draft) for draft in drafts]
        if rng.random() < 1 / (1 + math.exp(2 * (worth[1] - worth[2]))):  # and judges are noisy
            drafts[1:] = drafts[2], drafts[1]  # the worse one is chosen
        yield Example(" ".join([*words, TLDR.strip()]), *map(" ".join, drafts))
def task_rows(cfg: Config, split: str):  # yields a split's Examples; None for its own broken rows
    if cfg.task == "toy":
        yield from toy_rows(random.Random(f"{cfg.seed} {split}"), 2048 if split == "train" else 512)
    pairs = () if cfg.reward else (*range(3, 21), 22)  # numbers of the files of comparisons
    url, parse, names = {
        "toy": ("", None, []), "jsonl": ("", parse_jsonl, [f"{split}.jsonl"]),
        "hh": (HH_URL, parse_dialogue, [f"{name}/{split}.jsonl.gz" for name in cfg.hh_subsets]),
        "tldr": (TLDR_URL, parse_post, [f"datasets/tldr_3_filtered/{split}.jsonl", *(
            f"dataset/comparisons/batch{i}.json" for i in pairs)])}[cfg.task]
    for name in names:  # toy has no files
        path = Path(cfg.data_dir, name)
        for line, where in read_lines(fetch(path, f"{url}/{name}") if url else path):
            with telling(where):
                row = json.loads(line)
                refuse_if(not isinstance(row, dict), "a row must be a JSON object")
                in_train = row.get("split", split) == "train"  # of comparisons: or valid1, valid2
                if cfg.task != "tldr" or in_train == (split == "train"):
                    yield parse(row)
def load_task(cfg: Config, split: str, tokenizer) -> list[Example]:
    """The examples of a split ("train" or "test"), their prompts within max_prompt_tokens.
    Others are cut (tldr) or skipped, as are rows that the data set itself has broken; BadInput."""
    examples, broken, long = [], 0, 0
    for example in bar(task_rows(cfg, split), f"reading {split}"):
        prompt = example.prompt if example else ""
        while prompt and len(tokenizer(prompt).input_ids) > cfg.max_prompt_tokens:
            prompt = shorten(prompt) if cfg.task == "tldr" else ""
        examples += [example._replace(prompt=prompt)] if prompt else []
        broken, long = broken + (not example), long + bool(example and not prompt)
    said = f"{cfg.task} {split}: {len(examples)} examples ({broken} broken, {long} too long)"
    print(said, flush=True)
    refuse_if(len(examples) <= (split == "test"), f"too few usable rows: {said}")
    return examples
def having(examples: list[Example], text: str) -> list[Example]:  # those with this text
    return [example for example in examples if getattr(example, text) is not None]
def encode(tokenizer, texts: list[str], limit: int | None = None) -> list[list[int]]:
    """Ids of prompts, special tokens included; or of responses with eos, all cut to the limit."""
    ids = tokenizer(texts, add_special_tokens=limit is None).input_ids if texts else []
    return ids if limit is None else [(y + [tokenizer.eos_token_id])[:limit] for y in ids]

# ---- Models, and one layout for all of them: one prompt, n branches -----------------------------
# The n responses to a prompt share it. Its keys and values are computed once, into a cache; then
# the branches are fed, g of them to a row, token by token: column c of a row is token c // g of
# branch c % g. A branch begins with the prompt's last token x₃, whose output predicts y₁. Here are
# g = 2 branches a and b, left padding ·, and the mask, in which # is "sees":
#                        ·  x₁ x₂    x₃ᵃ x₃ᵇ y₁ᵃ y₁ᵇ y₂ᵃ y₂ᵇ       (cache, then row of branches)
#          predicts y₁ᵇ     #  #         #
#          predicts y₂ᵃ     #  #     #       #
#          predicts y₂ᵇ     #  #         #       #
# Sampling feeds one token of all branches at a time (g = n), scoring all columns at once with g =
# gcd(n, 4), the fastest (README, "The cost of a step"): P + nR tokens, where rows cost n(P + R).
MASKED = torch.finfo(torch.bfloat16).min  # finite in bf16 and fp32: rows of padding make no NaN
class Batch(NamedTuple):
    """B prompts with n responses each, padded. A mask says what is real: pad may equal eos."""
    prompt: Tensor  # (B, P) left-padded, without its last token
    real: Tensor  # (B, P) False on padding
    branch: Tensor  # (B, n, 1 + R) the prompt's last token, then the response, right-padded
    length: Tensor  # (B, n) tokens of each response
    ids: tuple  # the prompts and responses, as they were given
    scores: dict[str, Tensor]  # what is known of the responses, (B, n) each
def pack(prompts: list[list[int]], responses: list[list[list[int]]], device="cpu") -> Batch:
    """Ids of B prompts, a token or more each, and of n responses to each (with eos, if they end).
    Raises ValueError for an empty prompt or a ragged n."""
    if not all(prompts) or len({len(ys) for ys in responses}) != 1:
        raise ValueError("pack needs prompts of a token or more, and n responses to each")
    P, R = max(2, *map(len, prompts)) - 1, max(len(y) for ys in responses for y in ys)
    prompt = [[0] * (P + 1 - len(x)) + x[:-1] for x in prompts]  # (B, P)
    real = [[False] * (P + 1 - len(x)) + [True] * (len(x) - 1) for x in prompts]  # (B, P)
    branch = [[x[-1:] + y + [0] * (R - len(y)) for y in ys]  # (B, n, 1 + R)
              for x, ys in zip(prompts, responses, strict=True)]
    tensors = prompt, real, branch, [[len(y) for y in ys] for ys in responses]
    return Batch(*(torch.tensor(x, device=device) for x in tensors), (prompts, responses), {})
def fold(x: Tensor, g: int) -> Tensor:  # (B, n, T) branches to (B·n/g, T·g) rows
    return x.reshape(-1, g, x.shape[-1]).transpose(1, 2).flatten(1)
def unfold(x: Tensor, g: int, n: int) -> Tensor:  # (B·n/g, T·g) rows to (B, n, T) branches
    return x.unflatten(1, (-1, g)).transpose(1, 2).reshape(-1, n, x.shape[1] // g)
def feed(model, cache, batch: Batch, tokens: Tensor, g: int, first: int = 0):
    """The model's output for the branches' tokens (B, n, T) from `first` on, g branches a row."""
    (B, n, T), device = tokens.shape, tokens.device
    if first == 0:  # keys and values of the prompts, with gradients, then a copy for each row
        position = (batch.real.cumsum(-1) - 1).clamp(min=0)  # (B, P)
        model.base_model(batch.prompt, attention_mask=batch.real.long(), position_ids=position,
                         use_cache=True, past_key_values=cache)
        cache.batch_repeat_interleave(n // g)
    step = torch.arange(first + T, device=device)  # a token sees its branch, up to itself
    own = torch.kron(step <= step[first:, None], torch.eye(g, device=device).bool())  # (T·g, …)
    see = torch.cat([batch.real[:, None].expand(-1, T * g, -1), own.expand(B, -1, -1)], -1)
    # added to the attention scores: a boolean mask would be silently wrong under eager attention
    mask = torch.zeros(see.shape, dtype=model.dtype, device=device).masked_fill(~see, MASKED)
    position = batch.real.sum(-1, keepdim=True) + step[first:].repeat_interleave(g)  # (B, T·g)
    mask, position = (x.repeat_interleave(n // g, 0) for x in (mask[:, None], position))
    return model(fold(tokens, g), attention_mask=mask, position_ids=position, use_cache=True,
                 past_key_values=cache)

def sequence_log_prob(model, batch: Batch, temperature: float = 1.0) -> Tensor:
    """log q(y|x) of each response, (B, n), in nats, fp32, differentiable."""
    _, n, R = batch.branch[..., 1:].shape
    g = math.gcd(n, 4)
    output = feed(model, transformers.DynamicCache(), batch, batch.branch[..., :-1], g)
    logits = output.logits.float() / temperature  # (B·n/g, R·g, V)
    target = fold(batch.branch[..., 1:], g)  # (B·n/g, R·g)
    token = -F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    real = torch.arange(R, device=target.device) < batch.length[..., None]  # (B, n, R)
    return unfold(token.view_as(target), g, n).where(real, 0).sum(-1)

def score_reward(reward_model, batch: Batch, tokenizer=None, reward_tokenizer=None) -> Tensor:
    """The raw reward of each response, (B, n), fp32, read at its last token; differentiable. Models
    of another vocabulary read texts, with their own eos or as pairs: then pass both tokenizers."""
    if reward_tokenizer:
        prompts, *responses = (tokenizer.batch_decode(ids, skip_special_tokens=True)
                               for ids in (batch.ids[0], *batch.ids[1]))  # B, then n of each
        if not hasattr(reward_model, "score"):  # no decoder
            pairs = [(x, y) for x, ys in zip(prompts, responses, strict=True) for y in ys]
            rows = reward_tokenizer(pairs, padding=True, truncation="only_first",
                                    return_tensors="pt").to(reward_model.device)
            return reward_model(**rows).logits.float().view(batch.length.shape)
        responses = [encode(reward_tokenizer, ys, sys.maxsize) for ys in responses]
        batch = pack(encode(reward_tokenizer, prompts), responses, reward_model.device)
    n, model, cache = batch.branch.shape[1], reward_model.base_model, transformers.DynamicCache()
    g = math.gcd(n, 4)
    hidden = feed(model, cache, batch, batch.branch, g).last_hidden_state  # (B·n/g, (1 + R)·g, …)
    score = unfold(reward_model.score(hidden).squeeze(-1).float(), g, n)  # (B, n, 1 + R)
    return score.gather(-1, batch.length[..., None]).squeeze(-1)
@torch.no_grad()
def sample(model, prompts: list[list[int]], n: int, max_new_tokens: int, *, eos_id: int,
           temperature: float = 1.0, generator=None) -> tuple[list[list[list[int]]], Tensor]:
    """n responses to each prompt from softmax(logits / temperature), nothing truncated.
    Returns their ids (B, n), eos included unless cut at max_new_tokens, and log q′ (B, n) in fp32.
    With a list of generators, one per prompt, a prompt's samples do not depend on the others."""
    batch = pack(prompts, [[[]] * n for _ in prompts], model.device)  # branches hold the last token
    generators = generator if isinstance(generator, list) else [generator] * len(prompts)
    uniform = torch.stack([torch.rand(n, max_new_tokens, generator=g, dtype=torch.float64)
                           for g in generators]).to(model.device)  # (B, n, R)
    cache, ids, tokens = transformers.DynamicCache(), batch.branch, []  # ids: (B, n, 1)
    log_q, ended = torch.zeros(ids.shape, device=model.device), torch.zeros_like(ids).bool()
    for step in range(max_new_tokens):
        logits = feed(model, cache, batch, ids, n, step).logits.float()  # (B, n, V)
        log_p = (logits / temperature).log_softmax(-1)  # (B, n, V), fp32
        cdf = log_p.double().exp().cumsum(-1)  # (B, n, V), fp64
        ids = torch.searchsorted(cdf, uniform[..., step, None] * cdf[..., -1:], right=True)
        ids = ids.clamp(max=cdf.shape[-1] - 1)  # (B, n, 1)
        log_q += log_p.gather(-1, ids).where(~ended, 0)
        tokens.append(ids.where(~ended, -1))  # −1 after the end
        ended |= ids == eos_id
        if ended.all():
            break
    rows = torch.cat(tokens, -1).tolist()  # (B, n, R)
    return [[[token for token in y if token >= 0] for y in ys] for ys in rows], log_q.squeeze(-1)
def fp32_linear(head, hidden: Tensor) -> Tensor:  # bf16 logits would cost 0.2 nats over 53 tokens
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.float(), head.weight.float())
        return logits if head.bias is None else logits + head.bias.float()
def check_branches(model, P: int, R: int) -> None:  # BadInput if plain rows score otherwise
    ids = torch.randint(model.config.vocab_size, (2, P + R), generator=make_generator(0))
    ids = torch.cat([ids[[0, 0], :P], ids[:, P:]], 1).to(model.device)  # one prompt, two responses
    batch = pack(ids[:1, :P].tolist(), [ids[:, P:].tolist()], model.device)
    if hasattr(model, "score"):
        packed = score_reward(model, batch)
        plain = model.score(model.base_model(ids).last_hidden_state)[:, -1, 0]
    else:
        packed, log_p = sequence_log_prob(model, batch), model(ids).logits.log_softmax(-1)
        plain = log_p[:, P - 1 : -1].gather(-1, ids[:, P:, None]).sum((1, 2))
    gap = (packed[0] - plain).abs().max().item()  # measured: 1e-4; NaN fails
    refuse_if(not gap < 1e-3, f"{model.config.model_type} branches miss rows by {gap:.3g}")

def load(run, kind, name: str | None, new_head: bool = False):
    """A frozen fp32 model, dropout off, and its tokenizer; BadInput where they do not fit."""
    cfg, reward = run.cfg, kind is AutoModelForSequenceClassification
    torch.manual_seed(cfg.seed)  # decides what is not read from a file
    with telling(f"{name or 'the toy model'} cannot be used"):
        if name:
            safe = dict(trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(name, truncation_side="left", **safe)
            safe |= dict(dtype=torch.float32) | (dict(num_labels=1) if new_head else {})
            model, info = kind.from_pretrained(name, output_loading_info=True, **safe)
        else:
            (model, tokenizer), info = toy_model(cfg), {"missing_keys": []}
        P, R, C = cfg.max_prompt_tokens, cfg.max_response_tokens, cfg.max_comparison_tokens
        longest, lacking = P + max(R, 0 if cfg.reward else C), sorted(info["missing_keys"])[:1]
        context = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
        tokenizer.model_max_length = min(tokenizer.model_max_length, context)
        refuse_if(lacking and not new_head, f"it lacks {lacking}: was it trained for another use?")
        refuse_if(reward and model.config.num_labels != 1, "it has not one label, as a reward has")
        refuse_if(len(tokenizer) <= len(tokenizer.all_special_ids), "it has no tokenizer")
        refuse_if(len(tokenizer) > model.config.vocab_size, "it has more tokens than embeddings")
        refuse_if(not reward and tokenizer.eos_token_id is None, "it has no end-of-text token, eos")
        refuse_if(not reward and longest > context,
                  f"its context is {context} tokens, not {longest}: lower --max_prompt_tokens, "
                  "--max_response_tokens, --max_comparison_tokens")
        model = model.eval().requires_grad_(False).to(run.device)
        if head := getattr(model, "score", None) or model.get_output_embeddings():  # a decoder
            head.forward = functools.partial(fp32_linear, head)
            check_branches(model, P, R)
    return model, tokenizer

# ---- A run: its folder, its one state file, its guards ------------------------------------------
STAGES = ("sft", "reward", "brain", "done")
FREE = ("data_dir", "save_every", "micro_batch_tokens", "out", "overwrite")  # no other results

class Run:
    """What the stages share. Draws are keyed by (seed, stage, step), so stage, step, weights,
    optimizer and the refresh's samples are all that a killed run needs to continue bit for bit."""
    def __init__(self, cfg: Config):
        cuda = torch.cuda.is_available() and cfg.device != "cpu"
        refuse_if(not cuda and (cfg.device == "cuda" or (cfg.task, cfg.device) == ("tldr", "auto")),
                  f"--device {cfg.device}: there is no CUDA GPU; or give --device cpu")
        self.device, self.out = torch.device("cuda" if cuda else "cpu"), Path(cfg.out)
        self.dtype = torch.bfloat16 if cuda else torch.float32  # of frozen models and of compute
        self.autocast = functools.partial(torch.autocast, self.device.type, torch.bfloat16, cuda)
        self.cfg, self.reward_tokenizer = replace(cfg, device=self.device.type), None
        self.state, now = {"stage": "sft", "step": 0, "kept": []}, asdict(self.cfg)
        with telling(f"{self.out} holds a run that cannot be continued; --overwrite starts afresh"):
            if (self.out / "state.pt").exists() and not cfg.overwrite:
                self.state |= torch.load(self.out / "state.pt", "cpu", weights_only=True)
            old, self.kept = self.state.get("config", now), self.state.pop("kept")
            if changed := [k for k in now if k not in FREE and old.get(k) != now[k]]:
                raise ValueError("; ".join(f"{k} was {old.get(k)}, is {now[k]}" for k in changed))
        self.where = torch.cuda.get_device_name() if cuda else "cpu"
        print("{}: {} from stage {stage}, step {step}".format(self.where, self.out, **self.state))
    def save(self, stage: str, step: int, **parts) -> None:  # state.pt is replaced in one move
        parts |= dict(stage=stage, step=step, kept=self.kept, config=asdict(self.cfg),
                      metrics=(self.out / "metrics.jsonl").stat().st_size)
        with telling(f"{stage}, step {step}: no room for a state, the last one is kept", Halt):
            with open(self.out / "state.pt.part", "wb") as file:
                torch.save(parts, file)
                file.flush()
                os.fsync(file.fileno())  # on the disk, before the old one goes
            Path(file.name).rename(self.out / "state.pt")
    def export(self, model, name: str) -> None:  # out/NAME, with tokenizer: whole, or not at all
        if model.can_generate():  # `generate` shall sample what was trained
            model.generation_config.update(
                do_sample=True, temperature=self.cfg.temperature, top_k=0, top_p=1.0,
                eos_token_id=self.tokenizer.eos_token_id)
        with telling(f"no room for {self.out / name}, the last state is kept", Halt):
            for part in (model, self.tokenizer):  # to a folder that is renamed when whole
                part.save_pretrained(self.out / f"{name}.part")
            shutil.rmtree(self.out / name, ignore_errors=True)
            (self.out / f"{name}.part").rename(self.out / name)
    def require(self, fine: Tensor, what: str, batch: Batch) -> None:  # or stop; fine: (b, …)
        if not fine.all():
            prompt = self.tokenizer.decode(batch.ids[0][(~fine).flatten(1).any(1).nonzero()[0, 0]])
            raise Halt(f"{self.where}: {what}; prompt …{prompt[-60:]!r}; the last state is kept")

# ---- Training: one loop, three losses: of one branch (sft), two (reward model) and n (BRAIn) ----
def make_generator(*key) -> torch.Generator:  # which its key decides: (seed, stage, step, …)
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(63))
def draw(total: int, size: int, step: int, *key) -> list[int]:  # a step's share of range(total)
    epochs = range(1 + (step * size + size - 1) // total)  # shuffled anew in each
    order = [torch.randperm(total, generator=make_generator(*key, epoch)) for epoch in epochs]
    return torch.cat(order)[step * size :][:size].tolist()
def split(run: Run, prompts: list[list[int]], branch_tokens: int) -> list[slice]:
    """Micro-batches of prompts sorted by length; V logits take the memory of V/2¹⁶ tokens more."""
    longest = len(prompts[-1]) + branch_tokens * (1 + len(run.tokenizer) / 2**16)
    size = max(1, int(run.cfg.micro_batch_tokens / longest))
    return [slice(i, i + size) for i in range(0, len(prompts), size)]
def text_batches(run: Run, examples: list[Example], columns: tuple, limit: int) -> list[Batch]:
    """Micro-batches of given texts, a branch for each of the columns, sorted by prompt length."""
    prompts = encode(run.tokenizer, [example.prompt for example in examples])
    texts = [encode(run.tokenizer, [getattr(e, name) for e in examples], limit) for name in columns]
    rows = sorted(zip(prompts, *texts, strict=True), key=lambda row: len(row[0]))
    prompts, branches = [row[0] for row in rows], [list(row[1:]) for row in rows]
    parts = split(run, prompts, len(columns) * max(len(y) for ys in branches for y in ys))
    return [pack(prompts[part], branches[part], run.device) for part in parts]
def merge(found: list[dict]) -> dict[str, Tensor]:  # dictionaries of (b, …) to one of (B, …)
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}
def judge(run: Run, reward_model, batch: Batch) -> dict[str, Tensor]:  # the one reward, (b, n)
    last = batch.branch.gather(-1, batch.length[..., None]).squeeze(-1)  # (b, n) last tokens
    eos = (last == run.tokenizer.eos_token_id).float()  # (b, n) 1 where a response ends
    with run.autocast():
        raw = score_reward(reward_model, batch, run.tokenizer, run.reward_tokenizer)  # (b, n)
    return {"reward": raw - run.cfg.missing_eos_penalty * (1 - eos), "raw_reward": raw,
            "eos_share": eos, "response_tokens": batch.length.float()}

@torch.no_grad()
def sample_batches(run: Run, models: dict, name: str, prompts: list, n: int, *key) -> list[Batch]:
    """3.1 sample n responses to each of the sorted prompts from models[name]; 3.2 score them in
    the micro-batches and the autocast of 3.4: log q_θ − log q′ begins at exactly 0."""
    cfg, batches = run.cfg, []
    generators = [make_generator(cfg.seed, *key, i) for i in range(len(prompts))]  # one a prompt
    for part in bar(split(run, prompts, n * cfg.max_response_tokens), "sampling", leave=False):
        start = time.perf_counter()  # seconds
        with run.autocast():
            responses, log_q = sample(models[name], prompts[part], n, cfg.max_response_tokens,
                                      eos_id=run.tokenizer.eos_token_id,
                                      temperature=cfg.temperature, generator=generators[part])
            middle, batch = time.perf_counter(), pack(prompts[part], responses, run.device)
            batch.scores.update(judge(run, models["reward"], batch))
            for score, model in {"log_prior": "prior", "log_proposal": name}.items():
                batch.scores[score] = sequence_log_prob(models[model], batch, cfg.temperature)
        for score, values in batch.scores.items():
            run.require(values.isfinite(), f"{score} is not finite", batch)
        gap, length = log_q - batch.scores["log_proposal"], batch.length  # scored as sampled?
        same = gap.abs() <= 2e-3 / 53 * length.clamp(min=53)  # measured: 1.8e-4 nats in 53 tokens
        if run.dtype is torch.bfloat16:  # rounding walks at random, a wrong sampler to one side
            walk, drift = (gap / length.sqrt()).square().mean(), gap.sum().abs() / length.sum()
            same = ((walk <= 0.15**2) & (drift <= 0.01 + 0.1 / length.sum().sqrt())).expand_as(gap)
        run.require(same, f"scored is not sampled, by up to {gap.abs().max():.2g} nats", batch)
        run.clock.update(seconds_sampling=middle - start, tokens_sampled=length.sum().item(),
                         seconds_scoring=time.perf_counter() - middle)
        batches.append(batch)
    return batches
def sft_loss(cfg: Config, model, batch: Batch):  # −log p(reference|x) per token, T = 1, (b,)
    return -sequence_log_prob(model, batch)[:, 0] / batch.length[:, 0], {}
def preference_loss(cfg: Config, model, batch: Batch):  # −log P(chosen ≻ rejected), (b,)
    reward = score_reward(model, batch)  # (b, 2), the chosen one first
    return bradley_terry_loss(*reward.T), {"accuracy": preference(reward[:, :1], reward[:, 1:])}
def policy_loss(cfg: Config, model, batch: Batch):
    """3.3 weigh the samples: BRAIn's loss, (b,), and what to watch (README, "Metrics")."""
    log_policy = sequence_log_prob(model, batch, cfg.temperature)  # (b, n), as all of these
    known = [batch.scores[name] for name in ("log_prior", "log_proposal", "reward")]
    loss, (alpha, beta) = brain_loss(log_policy, *known, cfg.kl_coef, target=cfg.target,
                                     baseline=cfg.baseline, divergence=cfg.divergence)
    to_prior, rho = (log_policy.detach() - other for other in known[:2])  # log-ratios, (b, n)
    judged = {k: v.mean(-1) for k, v in batch.scores.items() if k[:3] != "log"}  # the samples'
    return loss, judged | {
        "ess_alpha": effective_sample_size(alpha), "ess_beta": effective_sample_size(beta),
        "reward_spread": known[2].std(-1) / cfg.kl_coef, "alpha_largest": alpha.amax(-1),
        "kl_to_prior": (beta * to_prior).sum(-1),  # the policy's, whose shares β̂ are
        "log_ratio_min": rho.amin(-1), "log_ratio_max": rho.amax(-1)}
def run_losses(run: Run, model, batches: list[Batch], loss_of, train: bool) -> dict[str, Tensor]:
    """The one micro-batch driver: losses and metrics (B,); to train, the mean loss's gradient."""
    found, total = [], sum(len(batch.prompt) for batch in batches)
    for batch in batches:
        with run.autocast(), torch.set_grad_enabled(train):
            loss, metrics = loss_of(run.cfg, model, batch)  # (b,)
        run.require(loss.isfinite()[:, None], "the loss is not finite", batch)
        if train:
            (loss.sum() / total).backward()  # adds up to the gradient of the mean over all
        found.append({"loss": loss.detach(), **metrics})
    return merge(found)

def fit(run: Run, stage: str, model, steps: int, lr: float, batches_of, loss_of) -> None:
    """The one training loop. `batches_of(step)`: micro-batches, and metrics to write with them."""
    optimizer = torch.optim.AdamW(model.requires_grad_().parameters(), eps=1e-5, weight_decay=0)
    start, every, saved = 0, run.cfg.save_every, time.monotonic()
    if run.state["stage"] == stage and "model" in run.state:
        model.load_state_dict(run.state["model"])
        optimizer.load_state_dict(run.state["optimizer"])
        start = run.state["step"]
    run.state = {"stage": stage}  # its memory is free again
    for step in (progress := bar(range(start, steps), stage, total=steps, initial=start)):
        run.where, run.clock = f"{stage}, step {step}", Counter()
        batches, metrics = batches_of(step)
        began, rate = time.perf_counter(), lr * (1 - step / steps)
        for name, values in run_losses(run, model, batches, loss_of, train=True).items():
            reduce = {"log_ratio_min": torch.min, "log_ratio_max": torch.max}.get(name, torch.mean)
            metrics[name] = reduce(values).item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.cfg.max_grad_norm)
        run.require(norm.isfinite().view(1, 1), "the step's gradient is not finite", batches[0])
        optimizer.param_groups[0]["lr"] = rate  # falls linearly to 0
        optimizer.step()
        optimizer.zero_grad()
        metrics |= {"gradient_norm": norm.item(), "learning_rate": rate, **run.clock,
                    "seconds_stepping": time.perf_counter() - began,
                    "tokens_stepped": sum(batch.length.sum().item() for batch in batches),
                    "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9}
        progress.set_postfix({k: v for k, v in metrics.items() if k in ("loss", "reward")})
        with open(run.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"stage": stage, "step": step, **metrics}) + "\n")
        due = (step + 1) % every == 0 if every else time.monotonic() - saved > 600
        if due or step + 1 == steps:
            run.save(stage, step + 1, model=model.state_dict(), optimizer=optimizer.state_dict())
            saved = time.monotonic()
    model.requires_grad_(False)
def brain_step(run: Run, models: dict, examples: list, exact: tuple | None, step: int) -> tuple:
    """A step of stage 3: the next prompts of the refresh, or of a new one when they are used up."""
    cfg, metrics, size = run.cfg, {}, run.cfg.prompts_per_step
    turns = cfg.prompts_per_refresh // size  # steps a refresh
    if step % turns == 0:
        index = draw(len(examples), size * turns, step // turns, cfg.seed, "brain")
        prompts = encode(run.tokenizer, [examples[i].prompt for i in index])  # all of a refresh
        name = "policy" if cfg.proposal == "lagged" else "prior"
        fresh = [sample_batches(run, models, name, sorted(prompts[i : i + size], key=len),
                                cfg.samples_per_prompt, step, i)
                 for i in range(0, len(prompts), size)]  # a list of micro-batches for each step
        run.kept = [[(*batch.ids, batch.scores) for batch in batches] for batches in fresh]
        found = merge([batch.scores for batches in fresh for batch in batches])
        reward, ratio = found["reward"], found["log_proposal"] - found["log_prior"]  # (B, n)
        metrics = {"refresh_reward": reward.mean().item(), "refresh_kl": ratio.mean().item(),
                   "refresh_kl_sd": ratio.std().item()}  # at step 0, what rounding makes of 0
        if exact and step % max(turns, cfg.steps // 5 // turns * turns) == 0:
            log_policy = exact_log_prob(run, models["policy"], exact[0])  # (p, |Y|)
            metrics["kl_to_posterior"] = kl(exact[1]["log_posterior"], log_policy)
            tqdm.write(", ".join([run.where, *(f"{k} {v:.3f}" for k, v in metrics.items())]))
        if not found["eos_share"].any():
            tqdm.write(f"warning: {run.where}: no response ends; has the policy collapsed?")
        if step == 0 and reward.std(-1).mean() > 5 * cfg.kl_coef:
            tqdm.write("warning: rewards spread by over 5 kl_coef: posterior is nearly argmax")
    return [pack(*ids, run.device)._replace(scores={k: v.to(run.device) for k, v in known.items()})
            for *ids, known in run.kept[step % turns]], metrics

# ---- Evaluation and report ----------------------------------------------------------------------
def preference(a: Tensor, b: Tensor) -> Tensor:
    """The share of pairs that a wins, ties counting half, per prompt: (P, m) and (P, k) to (P,)."""
    return (1 + (a[:, :, None] - b[:, None]).sign().mean((1, 2))) / 2
def wilson(wins: Tensor) -> tuple[float, list[float]]:
    """Win rate and Wilson's 95 % interval of shares (P,), at the trials that match their error."""
    rate, error, z = wins.mean().item(), wins.std().item() / math.sqrt(len(wins)), 1.96
    trials = rate * (1 - rate) / error**2 if error > 0 else len(wins)  # independent ones
    middle, scale = rate + z * z / (2 * trials), 1 + z * z / trials
    half = z * math.sqrt(rate * (1 - rate) / trials + (z / (2 * trials)) ** 2)
    return rate, [(middle - half) / scale, (middle + half) / scale]
def kl(log_p: Tensor, log_q: Tensor) -> float:  # mean KL(p ‖ q), known in full, (p, |Y|)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
@torch.no_grad()
def exact_log_prob(run: Run, model, batches: list[Batch]) -> Tensor:  # of all of Y, (p, |Y|)
    log_q = torch.cat([sequence_log_prob(model, batch, run.cfg.temperature) for batch in batches])
    run.require((log_q.exp().sum(-1, True) - 1).abs() < 1e-4, "Y does not sum to 1", batches[0])
    return log_q
def enumerate_posterior(run: Run, models: dict, examples: list[Example]) -> tuple | None:
    """Where Y can be listed (toy): batches of it, and reward, log prior, log posterior (p, |Y|)."""
    R, V = run.cfg.max_response_tokens, models["prior"].config.vocab_size
    if V**R > 50_000:
        return None
    drawn, eos = itertools.product(range(V), repeat=R), run.tokenizer.eos_token_id
    space = dict.fromkeys(y[: (*y, eos).index(eos) + 1] for y in drawn)  # cut after eos, as sampled
    prompts = encode(run.tokenizer, [example.prompt for example in examples])
    batches = [pack([x], [[list(y) for y in space]], run.device) for x in prompts]
    known = merge([judge(run, models["reward"], batch) for batch in batches])
    prior = known["log_prior"] = exact_log_prob(run, models["prior"], batches)
    known["log_posterior"] = (prior + known["reward"] / run.cfg.kl_coef).log_softmax(-1)
    return batches, known

def evaluate(run: Run, models: dict, examples: list[Example], exact: tuple | None) -> tuple:
    """Stage 4: rows of figures, with errors over the (sorted) held-out prompts, and samples."""
    prompts = encode(run.tokenizer, [example.prompt for example in examples])
    groups = {name: sample_batches(run, models, name, prompts, run.cfg.eval_samples, "eval", name)
              for name in ("prior", "policy")}
    found = {name: merge([b.scores for b in batches]) for name, batches in groups.items()}  # (P, m)
    if having(examples, "reference") == examples:  # whole, with eos
        groups["reference"] = text_batches(run, examples, ("reference",), sys.maxsize)
        found["reference"] = merge([judge(run, models["reward"], b) for b in groups["reference"]])
    wins = {(a, b): preference(found[a]["reward"], found[b]["reward"])
            for a in found for b in ("prior", "reference") if a != b and b in found}
    rows = {name: {key: values.mean().item() for key, values in of.items() if key[:3] != "log"}
            for name, of in found.items()}
    for name in ("prior", "policy"):  # log q − log p of q's own samples, (P, m); the policy's last
        ratio = found[name]["log_proposal"] - found[name]["log_prior"]
        error = ratio.mean(-1).std().item() / math.sqrt(len(ratio))  # over prompts
        rows[name] |= {"kl_to_prior": ratio.mean().item(), "kl_to_prior_se": error}
    pairs = found["policy"]["reward"][:, :, None] == found["prior"]["reward"][:, None]  # (P, m, m)
    rows["policy"]["tie_share"] = pairs.float().mean().item()
    if exact:  # the posterior's row, in expectation, and the truth about the policy
        batches, known = exact  # (p, |Y|)
        log_prior, log_posterior = known["log_prior"], known["log_posterior"]
        weight, truth = log_posterior.exp(), zip(log_prior.exp(), known["reward"], strict=True)
        rows["posterior"] = {key: (weight * values).sum(-1).mean().item()
                             for key, values in known.items() if key[:3] != "log"}
        rows["posterior"]["kl_to_prior"] = kl(log_posterior, log_prior)
        duels = torch.stack([(r[:, None] - r).sign() @ q for q, r in truth])  # (p, |Y|)
        wins["posterior", "prior"] = (1 + (weight * duels).sum(-1)) / 2  # (p,), as `preference`
        log_policy, ratio = exact_log_prob(run, models["policy"], batches), ratio[: len(batches)]
        rows["policy"] |= {
            "kl_to_posterior_start": kl(log_posterior, log_prior),  # the policy began as the prior
            "kl_to_posterior_end": kl(log_posterior, log_policy),
            "kl_to_prior_exact": kl(log_policy, log_prior),
            "kl_to_prior_sampled": ratio.mean().item(),  # of the same prompts
            "kl_to_prior_sampled_se": (ratio.var(-1).mean() / ratio.numel()).sqrt().item()}
    for (name, other), shares in wins.items():
        rows[name][f"win_rate_vs_{other}"], rows[name][f"win_rate_vs_{other}_ci"] = wilson(shares)
    return rows, groups

def report(run: Run, rows: dict, groups: dict, examples: list[Example], notes: list[str]) -> None:
    """report.md: what was run, a table, a chart and samples; all but the chart is printed, too."""
    columns = ("reward", "win_rate_vs_prior", "win_rate_vs_reference", "kl_to_prior", "eos_share",
               "response_tokens")
    forms = {"": "{:.3f}", "_ci": "[{0[0]:.3f}, {0[1]:.3f}]", "_se": "± {:.3f}"}  # of a cell
    table = [f"| | {' | '.join(columns)} |".replace("_", " "), "|---" * (1 + len(columns)) + "|"]
    for name, row in rows.items():  # prior, policy, reference, posterior
        cells = [" ".join(form.format(row[key + end]) for end, form in forms.items()
                          if key + end in row) for key in columns]
        table.append(f"| {name} | {' | '.join(cells)} |")
    texts = {name: [run.tokenizer.decode(ys[0]) for batch in batches for ys in batch.ids[1]]
             for name, batches in groups.items()}
    samples = [line for i, e in enumerate(examples[:4]) for line in (
        "", f"…{e.prompt[-120:]!r}", *(f"- {name}: {texts[name][i]!r}" for name in texts))]
    lines = map(json.loads, (run.out / "metrics.jsonl").read_text().splitlines())
    points = [(row["refresh_kl"], row["refresh_reward"]) for row in lines if "refresh_kl" in row]
    low, top = min(points)[0], max(points)[0]  # a refresh for each twelfth of the way in KL
    cells = {int(12 * (x - low) / (top - low or 1)): (x, y) for x, y in sorted(points)[::-1]}
    axes = zip(*sorted(cells.values()), strict=True)
    xs, ys = (", ".join(f"{value:.3f}" for value in axis) for axis in axes)
    theme = '%%{init: {"themeVariables": {"xyChart": {"plotColorPalette": "#d62728"}}}}%%'
    chart = ["```mermaid", theme, "xychart-beta", '    title "Reward against KL to the prior"',
             f'    x-axis "KL, nats" [{xs}]', '    y-axis "reward"', f"    line [{ys}]", "```"]
    text = [f"# BRAIn on {run.cfg.task}", "", *(f"- {note}" for note in notes), "", *table, "",
            *chart, "", "## Samples, one of each model", *samples, ""]
    (run.out / "report.md").write_text("\n".join(text))
    print("", *table, *(line[: shutil.get_terminal_size().columns] for line in samples), sep="\n")

# ---- Derivation checks: brain_loss and autograd on one side, the equations on the other ---------
Check = namedtuple("Check", "name claim error tolerance ok")  # error: largest absolute difference

def derivation_checks() -> list[Check]:
    """What the method rests on, in float64; right-hand sides in nothing but exp, log and sums."""
    drawn = torch.randn(4, 3, 5, dtype=torch.float64, generator=make_generator("checks"))
    n, kl_coef, checks, (q, p, q1, r) = 5, 0.7, [], drawn.requires_grad_()  # log q_θ, log p, log q′
    ratio, alpha = (q - q1).exp(), (p + r / kl_coef - q1).exp()  # exp(ρ) = q_θ/q′
    alpha, beta = (x / x.sum(-1, keepdim=True) for x in (alpha, ratio))  # α̂, β̂
    first = (alpha * (n * alpha / ratio).log()).sum(-1)  # Σ α̂ (log nα̂ − ρ)
    x, y, s = q[:, :2], p[:, :2], r[:, :2]  # n = 2 samples of the prior
    sign = (s - s.flip(-1)).sign()  # +1 chosen, −1 rejected
    odds = (sign * (x - y)).sum(-1, keepdim=True).exp()  # exp(Δ log(q_θ/p))
    total = r - kl_coef * (q - p)  # R = r − kl_coef·log(q_θ/p), PPO's reward
    advantage = total - (beta * total).sum(-1, keepdim=True)  # on-policy, RLOO's times (n − 1)/n
    bare, gradient = (q, p, q1, r), "Σ α̂ (log nα̂ − ρ) + A(ρ): gradient −Σ (α̂ − b) ∇log q_θ"
    for name, claim, tensors, dials, value, slope in (  # slope: the gradient's equation
            ("none", gradient, bare, dict(baseline="none"), first, -alpha),
            ("unnormalized", gradient, bare, dict(baseline="unnormalized"),
             first + ratio.mean(-1) - 1, ratio / n - alpha),
            ("self_normalized", gradient, bare, {}, first + ratio.mean(-1).log(), beta - alpha),
            ("DPO", "argmax of two samples of the prior is DPO-sft: −log σ(Δ log(q_θ/p))",
             (x, y, y, s), dict(target="argmax"), (1 + 1 / odds[:, 0]).log(), -sign / (1 + odds)),
            ("PPO", "KL(β̂ ‖ α̂) has the policy gradient −Σ β̂ (R − Σ β̂R) ∇log q_θ / kl_coef",
             bare, dict(divergence="reverse"), (beta * (beta / alpha).log()).sum(-1),
             -beta * advantage / kl_coef)):
        loss = brain_loss(*tensors, kl_coef, **dials)[0]  # (3,)
        found = torch.autograd.grad(loss.sum(), tensors[0], retain_graph=True)[0]  # (3, n)
        error = max((loss - value).abs().max().item(), (found - slope).abs().max().item())
        checks.append(Check(name, claim, error, 1e-12, error <= 1e-12))
    return checks

# ---- The stages, from data to report ------------------------------------------------------------
def toy_model(cfg: Config):  # a GPT-NeoX that knows nothing yet, and a tokenizer of 10 words
    words = {word: i for i, word in enumerate(["<eos>", TLDR.strip(), *KEYS, *FILLERS])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # one token a word
    model = AutoModelForCausalLM.from_config(transformers.GPTNeoXConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=32, bos_token_id=0, eos_token_id=0))
    return model, transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
def fit_texts(run: Run, stage: str, model, train: list, test: list) -> dict[str, Tensor]:
    """Stage 1 or 2, if it is still to do; then its losses and metrics on held-out texts, (N,)."""
    cfg = run.cfg
    name, columns, limit, loss_of, size, epochs, lr = {
        "sft": ("prior", ("reference",), cfg.max_response_tokens, sft_loss,
                cfg.sft_batch, cfg.sft_epochs, cfg.sft_lr),
        "reward": (stage, ("chosen", "rejected"), cfg.max_comparison_tokens, preference_loss,
                   cfg.reward_batch, cfg.reward_epochs, cfg.reward_lr)}[stage]
    train, test = having(train, columns[0]), having(test, columns[0])
    if STAGES.index(run.state["stage"]) <= STAGES.index(stage):
        fit(run, stage, model, math.ceil(epochs * len(train) / size), lr, lambda step: (
            text_batches(run, [train[i] for i in draw(len(train), size, step, cfg.seed, stage)],
                         columns, limit), {}), loss_of)
        run.export(model, name)
    held_out = text_batches(run, test[: cfg.eval_prompts], columns, limit)
    return run_losses(run, model, held_out, loss_of, train=False)

def prepare(run: Run) -> tuple:
    """Models and data, all read and found good before anything is written to the run's folder."""
    cfg, out, behind = run.cfg, run.out, STAGES.index(run.state["stage"])
    source = cfg.prior or (str(out / "prior") if behind > 0 else cfg.base)  # toy: None
    prior, run.tokenizer = load(run, AutoModelForCausalLM, source)
    reward, source = None, cfg.reward or (str(out / "reward") if behind > 1 else None)
    if source:
        reward, own = load(run, AutoModelForSequenceClassification, source)
        run.reward_tokenizer = own if own.get_vocab() != run.tokenizer.get_vocab() else None
    train, test = (load_task(cfg, part, run.tokenizer) for part in ("train", "test"))
    for name, text in ("prior", "reference"), ("reward", "chosen"):
        refuse_if(not (getattr(cfg, name) or (having(train, text) and having(test, text))),
                  f"train or test has no row with a {text} text; add some, or give --{name}")
    with telling(f"--out {out} cannot be written"):
        out.mkdir(parents=True, exist_ok=True)
        size, free = 12e-9 * prior.num_parameters(), shutil.disk_usage(out).free / 1e9
        print(f"a state (weights, two moments) takes {size:.2g} GB, {free:.3g} GB are free")
        refuse_if("config" not in run.state and free < 3 * size,  # two states and the models
                  f"it needs {3 * size:.3g} GB of free space")
        (out / "config.json").write_text(json.dumps(asdict(cfg), indent=1) + "\n")
        with open(out / "metrics.jsonl", "a") as file:
            file.truncate(run.state.get("metrics", 0))
    if "config" not in run.state:  # from here on, this folder is of this configuration
        run.save("sft", 0)
    print(*(f"{name}={value}" for name, value in asdict(cfg).items()), flush=True)
    return prior, reward, train, test

def execute(cfg: Config) -> dict:
    """Stages 1 to 4; the figures of the last line."""
    run, began = Run(cfg), time.time()
    if run.state["stage"] == "done":
        print(f"this run is finished, see {run.out / 'report.md'}; --overwrite starts afresh")
        return run.state["result"]  # the same figures as then
    prior, reward, train, test = prepare(run)
    notes = [f"{cfg.steps} steps, kl_coef {cfg.kl_coef}, seed {cfg.seed}, on {run.where}."]
    if not cfg.prior:  # stage 1
        loss = fit_texts(run, "sft", prior, train, test)["loss"]
        notes += [f"Prior: {loss.mean():.3f} nats a token on {len(loss)} held-out references."]
    if not cfg.reward:  # stage 2
        source = cfg.prior or str(run.out / "prior")
        reward = reward or load(run, AutoModelForSequenceClassification, source, new_head=True)[0]
        right = fit_texts(run, "reward", reward, train, test)["accuracy"]
        notes += ["Reward model: {:.3f} [{:.3f}, {:.3f}] of {} held-out pairs right.".format(
            right.mean(), *wilson(right)[1], len(right))]
    print(*notes, sep="\n", flush=True)
    torch.backends.cuda.matmul.allow_tf32 = True  # fp32 heads: 10 bits of mantissa, bf16 has 7
    prior = prior.to(run.dtype)  # stage 3: the policy starts from the prior's rounded weights
    models = dict(prior=prior, reward=reward.to(run.dtype), policy=copy.deepcopy(prior).float())
    if cfg.task == "tldr":  # no mere comparisons
        train, test = having(train, "reference"), having(test, "reference")
    index = draw(len(test), min(cfg.eval_prompts, len(test)), 0, cfg.seed, "eval")
    held = sorted((test[i] for i in index), key=lambda e: len(run.tokenizer(e.prompt).input_ids))
    exact = enumerate_posterior(run, models, held[:16])
    step = functools.partial(brain_step, run, models, train, exact)
    fit(run, "brain", models["policy"], cfg.steps, cfg.lr, step, policy_loss)
    run.export(models["policy"], "policy")  # for AutoModelForCausalLM.from_pretrained
    run.where, run.clock = "eval", Counter()  # stage 4
    rows, groups = evaluate(run, models, held, exact)
    notes += [f"Evaluation: {len(held)} held-out prompts × {cfg.eval_samples} samples, judged by "
              "training's reward model; {tie_share:.3f} of pairs tie.".format(**rows["policy"])]
    report(run, rows, groups, held, notes)
    result = dict(task=cfg.task, steps=cfg.steps, seconds=round(time.time() - began, 1),
                  win_rate_vs_reference=None, win_rate_vs_reference_ci=None, reward_reference=None)
    result |= {f"reward_{name}": row["reward"] for name, row in rows.items()}
    result |= {k: v for k, v in rows["policy"].items() if "reward" not in k}
    run.save("done", cfg.steps, result=result)  # a repeated command prints the result
    return result

def main(argv: list[str] | None = None) -> int:
    """0: done; 1: a check failed or a guard stopped the run; 2: bad input; 130: Ctrl-C."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading weights, and all of the hub's
    if sys.stdout.isatty():
        utils.enable_progress_bars()  # of downloads
    utils.logging.set_verbosity_error()
    try:
        cfg = parse_config(argv)
        if not cfg.check:
            print(json.dumps(execute(cfg)))
            return 0
        for name, claim, error, tolerance, ok in (checks := derivation_checks()):
            print(f"{'ok' if ok else 'FAIL'}  {error:.1e} ≤ {tolerance:.0e}  {name}: {claim}")
        return 0 if all(check.ok for check in checks) else 1
    except SystemExit as stop:  # --help
        return stop.code
    except KeyboardInterrupt:
        status, message = 130, "stopped; the same command continues"
    except torch.OutOfMemoryError:
        status, message = 1, "out of memory: repeat with a lower --micro_batch_tokens"
    except (BadInput, Halt, OSError) as error:
        status, message = 2 if isinstance(error, BadInput) else 1, error
    print(f"brain.py: {message}", file=sys.stderr)
    return status

if __name__ == "__main__":
    sys.exit(main())
