r"""SUR-adapter: an LLM's understanding of narrative prompts, distilled (arXiv 2305.05189).

The idea. "A trio of balls the colour of grass" means "green, circle, x3", but a text-to-image model
that has learned only the second does not know it. SUR, an adapter for semantic understanding and
reasoning, sits between the frozen text encoder and the frozen network. It learns from triples
(narrative prompt v, keyword prompt k, image): the image must be denoised well; y, made from v, must
come close to the features of k; and its mean must match what an LLM makes of v. The last needs no
triple, so it also teaches words that no triple has, such as "moss", which only the LLM has read.
The LLM is not needed to generate images.

    x = text encoder(v)                                    (B, L, d), frozen
    h = transformer encoder(x)                             (B, L, d)
    w = softmax((W_q h) (W_k x)^T / sqrt(d)) x + h         (B, L, d)
    a = W_2 relu(W_1 w) + w                                (B, L, d)
    y = x + eta fc(a)                                      (B, L, d), replaces x

    D(teacher, student) = T^2 KL(softmax(student / T) || softmax(teacher / T))
                          over the d features of a token, summed over tokens, mean over the batch
    L = noise_weight  |network(x_t, t, y) - target|^2
      + prompt_weight D(text encoder(k), y)
      + llm_weight    D(P mean LLM(v), mean y)             for the v of triples, and for others
    P: an affine map from the LLM's width to d, fitted once to the triples to bring P mean LLM(v)
       near mean text encoder(k). mean LLM(v) is over the tokens of v; the other means are over all
       L positions, with the last token repeated over the padding.

fc starts at zero: at first y = x. The empty prompt of guidance goes through the adapter, too.

    python sur_adapter.py --train    # on runs/uvit_fusion: 7 to 16 min; 82 % of narratives right
                                     # (base: 0.4 %), 64 % of those with unheard words
    python sample.py "a trio of balls the colour of grass" --adapter runs/sur_adapter

Differs from the paper (in brackets what its released code does; docs/sur_adapter.md lists all 13):
 1. The noise loss trains the adapter [its gradient is cut off].
 2. The encoder attends over the tokens of a prompt, without padding [over the prompts of a batch].
 3. The LLM teaches y, which the network reads [h, which y may ignore].
 4. P is fitted to the triples [random]; it is frozen, as in the release.
 5. The LLM also reads narratives without keyword prompts and images [those of the triples only].
 6. y = x + eta fc(a), the identity at the start [(1 - eta) x + eta fc(a), which is not].
 7. w adds h [x: then h only decides where to attend].
 8. toy: eta 1, weights 3, 0.2 and 2, T = 4 [eta 0.1, weights 1, 1e-5 and 1e-5, T = 1].
"""
import argparse
import copy
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
from tqdm import trange

import common
import encoders
import image_data
import toy.narratives
import toy.validation
import uvit_fusion
from common import UserError
from uvit_fusion import Block, diffusion_loss, padding_bias, softmax_attention


@dataclass
class Config:
    base: str = "runs/uvit_fusion"  # run of uvit_fusion.py whose text encoder gets the adapter
    llm: str = "runs/toy/llm_instructed"  # language model to distil: a folder, or a hub name
    llm_layer: int = -2             # its layer to distil: 0 the embeddings, -1 the last
    instruction: str = ". in plain words:"  # what the LLM reads after a narrative
    layers: int = 2                 # of the adapter's transformer encoder
    heads: int = 4                  # of its attention
    feed_forward: int = 96          # width of its feed-forward layers
    residual: Literal["h", "x"] = "h"  # what w adds to its attention; the paper adds x
    eta: float = 1.0                # weight of the adapter in its output
    noise_weight: float = 3.0       # weight of the noise loss
    prompt_weight: float = 0.2      # weight of the distance to the keyword prompt
    llm_weight: float = 2.0         # weight of the distance to the LLM
    llm_student: Literal["y", "h"] = "y"  # what the LLM teaches; the paper: h
    llm_projection: Literal["fitted", "random"] = "fitted"  # P; the paper: random
    temperature: float = 4.0        # T of both distances; at 1 very negative features hardly count
    steps: int = 2800               # training steps
    batch_size: int = 64            # triples per step
    images: int = 16                # triples per step with a noise loss, the costly term
    texts: int = 32                 # more narratives per step, from the data's narratives.txt
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: on all matrices, AdamW on the rest
    lr: float = 2e-3                # highest learning rate of AdamW
    muon_lr: float = 2e-2           # highest learning rate of Muon
    warmup: int = 50                # steps of linear warm-up
    decay: float = 1.0              # share of the steps, at the end, in which the rate falls to 0
    weight_decay: float = 0.01      # of both optimizers
    betas: tuple = (0.9, 0.99)      # of AdamW
    grad_clip: float = 1.0          # largest norm of the gradient (0: no clipping)
    ema: float = 0.99               # decay of the running average of the weights, lower at first
    caption_dropout: float = 0.1    # share of triples whose prompts are replaced by the empty one
    seed: int = 0                   # of weights, order and noise
    data: str = "shapes"            # "shapes" (the toy world), or a folder with metadata.jsonl
    # no flags: `prepare` sets the hashes of the weights; sample.py loads a run by its method
    base_identity: str = ""
    llm_identity: str = ""
    method: str = "sur_adapter"

    def __post_init__(self):
        common.check_bounds(self, layers=(0, 1000), feed_forward=(1, 10**5), images=(1, 2**20),
                            texts=(0, 2**20), temperature=(1e-6, 1e6), eta=(1e-6, 1e6))
        if not (self.noise_weight or self.prompt_weight or self.llm_weight):
            raise UserError("--noise-weight, --prompt-weight, --llm-weight: one must be above 0")


PRESETS = {
    "toy": {},
    # the values of the release, made for Stable Diffusion 1.5 and LLaMA-13B; for P see the docs
    "paper": dict(
        base="runs/coco", llm="lmsys/vicuna-13b-v1.5", instruction="", data="SURD",
        heads=8, feed_forward=2048, residual="x", eta=0.1,
        llm_student="h", llm_projection="random", texts=0,
        noise_weight=1.0, prompt_weight=1e-5, llm_weight=1e-5, temperature=1.0,
        steps=5000, batch_size=4, images=4, caption_dropout=0.0,
        optimizer="adamw", lr=1e-5, warmup=0, decay=0.0, betas=(0.9, 0.999), ema=0.0,
    ),
}
# --quick: a smaller run
QUICK = dict(out="runs/quick_sur_adapter", samples=128, steps=200, warmup=20)


# ------------------------------------------------------------------------------------ the adapter
class Adapter(nn.Module):
    """Text features x -> features y of the same shape; dim: d."""
    def __init__(self, cfg, dim):
        super().__init__()
        if dim % cfg.heads:
            raise UserError(f"--heads {cfg.heads}: choose a divisor of {dim}, the text's width")
        self.eta = cfg.eta
        self.residual = cfg.residual
        self.encoder_blocks = nn.ModuleList(
            Block(dim, cfg.heads, hidden=cfg.feed_forward) for _ in range(cfg.layers))
        for block in self.encoder_blocks:                  # near the identity at first
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.fc2.weight)
        self.query = nn.Linear(dim, dim, bias=False)                                # W_q
        self.key = nn.Linear(dim, dim, bias=False)                                  # W_k
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.fc = nn.Linear(dim, dim)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def encode(self, x, bias):
        for block in self.encoder_blocks:
            x = block(x, bias=bias)
        return x

    def forward(self, x, mask):
        """x (B, L, d), mask (B, L) -> y (B, L, d), and the encoder's states h (B, L, d)."""
        bias = padding_bias(mask)                                                   # (B, 1, 1, L)
        # h = transformer encoder(x)
        h = self.encode(x, bias)
        # w = softmax((W_q h) (W_k x)^T / sqrt(d)) x + h
        attention = softmax_attention(self.query(h), self.key(x), x, bias[:, 0])     # one head
        w = attention + (h if self.residual == "h" else x)
        # a = W_2 relu(W_1 w) + w
        a = self.mlp(w) + w
        # y = x + eta fc(a)
        y = x + self.eta * self.fc(a)
        return y, h


# --------------------------------------------------------------------------------------- the loss
def feature_kl(teacher, student, token_mask, temperature):
    """D = T^2 KL(softmax(student / T) || softmax(teacher / T)), a scalar.

    teacher, student: (B, L, d). Summed over the tokens of token_mask (B, L), mean over B. T^2 makes
    up for the gradient, which falls as 1 / T^2. The student comes first, as in the release: it must
    be small where its teacher is.
    """
    log_p = (student.float() / temperature).log_softmax(-1)
    log_q = (teacher.float() / temperature).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)                                    # (B, L)
    return temperature**2 * (kl * token_mask).sum(1).mean()


def pad_with_last_token(features, mask):
    """features (B, L, d) with the last token of each text in place of its padding."""
    last = mask.sum(1, keepdim=True) - 1                                            # (B, 1)
    source = torch.arange(mask.shape[1], device=mask.device).minimum(last)          # (B, L)
    return features.gather(1, source[..., None].expand_as(features))


def seen(pipeline, mask):
    """The tokens that the network reads: mask (B, L), or all if it sees the padding too."""
    return mask if pipeline.cfg.mask_text else torch.ones_like(mask)


def fit_and_project(cfg, llm_means, rows, targets):
    """Fits P to the triples; returns P mean LLM(v) of all N texts, (N, d).

    llm_means (N, llm_dim): mean LLM(v); rows (n,): which of the N are the narratives of triples;
    targets (n, d): the mean features of their keyword prompts. P knows no words: "moss" and "grass"
    are alike to it if they are alike to the LLM.
    """
    llm_means = llm_means.double()
    targets = targets.double()
    known = llm_means[rows]
    z = (llm_means - known.mean(0)) / (known.std(0) + 1e-3)   # mean 0, deviation 1 over triples
    X = z[rows]                                                                     # (n, llm_dim)
    Y = targets - targets.mean(0)                                                         # (n, d)
    width = X.shape[1]
    if cfg.llm_projection == "fitted":
        # ridge regression, P = argmin |X P - Y|^2 + 10 |P|^2
        P = torch.linalg.solve(X.T @ X + 10 * torch.eye(width), X.T @ Y)
    else:                                     # the release maps the raw states, and adds no mean
        P = torch.randn(width, Y.shape[1], dtype=X.dtype) / width**0.5
    return (z @ P + targets.mean(0)).float()


def losses(cfg, adapter, pipeline, x, mask, target, target_mask, llm_target, x_0, t, eps):
    """The three terms of L without their weights: noise, prompt, llm.

    pipeline: the frozen base. x (B + M, L, d), mask (B + M, L): the encoded narratives of B
    triples and M others; target, target_mask: the B keyword prompts; llm_target
    (B + M, d): what the LLM makes of each narrative, from `fit_and_project`.
    x_0, eps (b, C, S, S), t (b,): of the first b <= B triples, for the noise loss.
    """
    token_mask = seen(pipeline, mask)
    # v may be longer than k, and needs a target there too
    target = pad_with_last_token(target, seen(pipeline, target_mask))
    B = len(target)
    b = len(t)
    with common.autocast(pipeline.device, pipeline.precision):
        y, h = adapter(x, mask)
        noise = diffusion_loss(pipeline.model, pipeline.diffusion, x_0, t, eps, y[:b], mask[:b])
        prompt = feature_kl(target, y[:B], token_mask[:B], cfg.temperature)
        # D(P mean LLM(v), mean y)
        student = pad_with_last_token(y if cfg.llm_student == "y" else h, token_mask)
        mean = student.mean(1, keepdim=True)                                    # (B + M, 1, d)
        one_token = torch.ones_like(mask[:, :1])
        llm = feature_kl(llm_target[:, None], mean, one_token, cfg.temperature)
    return noise, prompt, llm


# --------------------------------------------------------------------------------------- training
def load_triples(pipeline, root):
    """(dataset, texts) of a folder with metadata.jsonl.

    The dataset has the training images (19 of 20, if the folder has no splits), with a pair (v, k)
    in place of a caption; texts are the lines of narratives.txt, if there is one: further
    narratives without an image or keyword prompt.
    """
    dataset = pipeline.dataset(root, "train")
    expected = ('expected metadata.jsonl with lines '
                '{"file_name": ..., "text": (narrative), "prompt": (keywords)}')
    with common.reading(f"--data {root}", expected):
        dataset.items = [(path, [(captions[0], image_data.one_line(line["prompt"]))], line)
                         for path, captions, line in dataset.items]
    path = Path(root) / "narratives.txt"
    lines = common.read_text(path).splitlines() if path.exists() else []
    texts = [image_data.one_line(line) for line in lines if line.strip()]
    return dataset, texts


def encode_once(pipeline, llm, instruction, texts):
    """Encodes N texts once with both frozen models: at every step, that would take half the time.

    Returns the text encoder's features (N, L, d), masks (N, L) and means over tokens (N, d), and
    the LLM's means (N, llm_dim). The LLM reads the instruction after each text.
    """
    text_encoder = pipeline.text_encoder
    features = torch.zeros(len(texts), text_encoder.length, text_encoder.dim)
    masks = torch.zeros(len(texts), text_encoder.length, dtype=torch.bool)
    means = torch.zeros(len(texts), text_encoder.dim)
    llm_means = torch.zeros(len(texts), llm.dim)
    for start in trange(0, len(texts), 64, desc="encoding texts", leave=False):
        rows = slice(start, start + 64)
        features[rows], masks[rows] = text_encoder(texts[rows])
        means[rows] = pad_with_last_token(features[rows], seen(pipeline, masks[rows])).mean(1)
        states, mask = llm([text + instruction for text in texts[rows]])      # (B, n, llm_dim)
        llm_means[rows] = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return features, masks, means, llm_means


def train(cfg, pipeline, llm, dataset, texts, folder, args, adapter_class=Adapter):
    """Trains an adapter for the frozen base `pipeline`; returns a pipeline with its EMA weights.

    llm: `encoders.LLMEncoder`; dataset, texts: from `load_triples`; args: .resume, .overwrite.
    """
    device = pipeline.device
    torch.manual_seed(cfg.seed)
    adapter = adapter_class(cfg, pipeline.text_encoder.dim).to(device)
    ema = copy.deepcopy(adapter).eval().requires_grad_(False)
    parameters = list(adapter.parameters())                  # lists: see `uvit_fusion.train`
    ema_parameters = list(ema.parameters())
    optimizers = uvit_fusion.make_optimizers(adapter, cfg, pipeline.precision, ("weight",))
    triples = [pairs[0] for _, pairs, _ in dataset.items]                     # (v, k)
    every_text = ["", *(text for pair in triples for text in pair), *texts]
    # the row of each distinct text in the tensors below
    row_of = {text: row for row, text in enumerate(dict.fromkeys(every_text))}
    features, masks, means, llm_means = encode_once(pipeline, llm, cfg.instruction, list(row_of))
    narratives = [row_of[v] for v, _ in triples]
    keywords = [row_of[k] for _, k in triples]
    llm_targets = fit_and_project(cfg, llm_means, narratives, means[keywords])
    llm_targets[row_of[""]] = means[row_of[""]]      # the empty prompt stays as it is
    run = common.Run(folder, cfg, [adapter, ema, *optimizers], ema.state_dict(), args,
                     pipeline.precision, title="adapter", dataset=dataset)
    loader = image_data.batches(dataset, cfg.batch_size, run.start, cfg.steps, cfg.seed)

    for step, (images, pairs) in enumerate(loader, run.start + 1):
        torch.manual_seed(cfg.seed * 10**9 + step)   # a resumed run equals an uninterrupted one
        uvit_fusion.set_learning_rate(optimizers, cfg, step)
        dropped = torch.rand(len(pairs)) < cfg.caption_dropout
        pairs = [("", "") if drop else pair for drop, pair in zip(dropped, pairs)]
        v = [row_of[narrative] for narrative, _ in pairs]                     # B rows
        k = [row_of[prompt] for _, prompt in pairs]
        if texts:                                                             # M more
            v += [row_of[texts[i]] for i in torch.randint(len(texts), (cfg.texts,))]
        x = features[v].to(device)                                            # (B + M, L, d)
        mask = masks[v].to(device)                                            # (B + M, L)
        target = features[k].to(device)
        target_mask = masks[k].to(device)
        x_0 = pipeline.encode(images[:cfg.images])                            # (b, C, S, S)
        t = pipeline.diffusion.sample_timesteps(len(x_0), pipeline.cfg.time_power, device)
        eps = torch.randn_like(x_0)
        noise, prompt, llm_term = losses(
            cfg, adapter, pipeline, x, mask, target, target_mask, llm_targets[v].to(device),
            x_0, t, eps)
        loss = cfg.noise_weight * noise + cfg.prompt_weight * prompt + cfg.llm_weight * llm_term
        adapter.zero_grad()
        loss.backward()
        if cfg.grad_clip:
            nn.utils.clip_grad_norm_(parameters, cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        uvit_fusion.update_ema(ema_parameters, parameters, min(cfg.ema, step / (step + 10)))
        run.log(step, noise=noise, prompt=prompt, llm=llm_term)
        if run.due(step):
            run.save(step)
    return with_adapter(pipeline, ema)


# -------------------------------------------------------------------------- the adapter on its base
class AdaptedEncoder:
    """A text encoder followed by an adapter: prompts -> features (B, L, d), mask (B, L)."""
    def __init__(self, text_encoder, adapter, precision):
        self.text_encoder = text_encoder
        self.adapter = adapter
        self.precision = precision

    def __call__(self, prompts):
        x, mask = self.text_encoder(prompts)
        with common.autocast(x.device, self.precision):
            y, _ = self.adapter(x, mask)
        return y, mask


def with_adapter(pipeline, adapter):
    """A copy of `pipeline` with the adapter after its text encoder."""
    pipeline = copy.copy(pipeline)
    pipeline.text_encoder = AdaptedEncoder(pipeline.text_encoder, adapter, pipeline.precision)
    return pipeline


def attach(pipeline, path):
    """`pipeline` with the adapter of a run folder, or of a .safetensors file in one.

    Raises UserError if the adapter was trained for another base.
    """
    folder, weights = common.run_files(path)
    cfg = common.read_config(Config, folder)
    # it is that of llm_adapter.py, or has an adapter already
    adapted = not isinstance(pipeline.text_encoder, encoders.TextEncoder)
    if adapted or pipeline.identity() != cfg.base_identity:
        raise UserError(f"the adapter in {folder}/ was trained for {cfg.base} as it was then, not "
                        "for this network and text encoder: name its base with --run")
    adapter = Adapter(cfg, pipeline.text_encoder.dim).to(pipeline.device)
    common.load_into(adapter, common.read_weights(weights, f"checkpoint {weights}"), weights)
    return with_adapter(pipeline, adapter.eval().requires_grad_(False))


def load_pipeline(path, device, precision, **changes):
    """The base that a run folder names, with the run's adapter; changes: to the base's settings."""
    cfg = common.read_config(Config, common.run_files(path)[0])
    return attach(uvit_fusion.load_pipeline(cfg.base, device, precision, **changes), path)


# --------------------------------------------------------------------------------------------- main
def prepare(cfg, args):
    """The base, the folder of the data, the LLM, and cfg with the identities of base and LLM."""
    device = common.pick_device(args.device)
    precision = common.pick_precision(args.precision, device)
    base = uvit_fusion.load_pipeline(cfg.base, device, precision)
    data = toy.prepare(cfg.data, base.cfg.clip, base.image_size, cfg.llm)
    llm = encoders.LLMEncoder(cfg.llm, cfg.llm_layer, device=device, dtype=precision)
    cfg = dataclasses.replace(cfg, base_identity=base.identity(), llm_identity=llm.identity)
    return base, data, llm, cfg


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true",
                        help="train the adapter and, on the toy world, grade it")
    parser.add_argument("--samples", type=common.positive, default=2048,
                        help="held-out prompts of each kind to grade (default %(default)s)")
    parser.add_argument("--sample-steps", type=common.positive, default=10,
                        help="sampling steps per graded image (default %(default)s)")
    common.add_training_flags(parser, "run folder (default runs/sur_adapter)", QUICK)
    common.add_config_flags(parser, Config, PRESETS)
    args = common.parse_args(parser, QUICK)
    if not args.train:
        parser.print_help()
        return
    cfg = common.make_config(Config, PRESETS, args)
    if cfg.data != "shapes":
        common.refuse_flags(parser, args, ["sample_steps"], "it is only for the toy world")
    folder = Path(args.out or "runs/sur_adapter")
    common.check_run(folder, args)
    base, data, llm, cfg = prepare(cfg, args)
    begin = time.time()
    if cfg.data == "shapes":                         # its triples are with its training images
        dataset, texts = load_triples(base, f"{data}/train2017")
    else:
        dataset, texts = load_triples(base, data)
    adapted = train(cfg, base, llm, dataset, texts, folder, args)
    if cfg.data == "shapes":
        figures = toy.narratives.report(
            base, adapted, cfg.llm, data, folder, args.samples, args.sample_steps)
        common.finish(folder, figures, begin)
    else:
        toy.validation.report(adapted, data, folder, args.samples, begin)


if __name__ == "__main__":
    common.entry(main)
