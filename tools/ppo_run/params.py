"""The parameters of ``ppo-run``; options, schema and manifest come from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option
from tuneutils.shared.methods import METHODS


@dataclass(frozen=True, kw_only=True)
class Params:
    """What decides the result of a PPO run (and, where noted, only how it is run).

    Defaults are those of "The N+ Implementation Details of RLHF with PPO" (Huang et al. 2024,
    arXiv 2403.17031, table 7) unless said otherwise.
    """

    model: str = option(help="The SFT model to start from: artifact, folder, GGUF or Hub id.", short="-m")
    reward: str = option(
        help="An rm-train artifact, builtin:NAME[:NUMBER], a Python module:function, or an http(s) URL.",
        short="-r",
    )
    heldout: str | None = option(None, help="Prompts on which the reward is measured before and after.")
    method: str = option(
        "lora", help=f"{', '.join(METHODS)}, or any PEFT method by its name.", metavar="NAME"
    )
    algo: str = option(
        "ppo",
        help="PPO, or its kin without a value model by TRL's trainers.",
        choices=("ppo", "rloo", "grpo"),
    )
    group_size: int = option(8, help="Responses to one prompt that rloo and grpo compare.", min=2)
    value: str = option(
        "auto",
        help="The value model: a head on the policy, or a copy of the reward model where there is one.",
        choices=("auto", "policy", "reward"),
    )
    updates: int = option(100, help="Batches of episodes to collect and learn from.", min=1)
    batch_size: int = option(64, help="Episodes of one update, over all processes.", min=1)
    minibatches: int = option(1, help="Optimizer steps of one pass over a batch.", min=1)
    ppo_epochs: int = option(4, help="Passes over each batch, each in an order of its own.", min=1)
    micro_batch_size: int = option(8, help="Rows of a forward and backward pass in each process.", min=1)
    rollout_batch_size: int = option(32, help="Rows generated at once in each process.", min=1)
    max_new_tokens: int = option(53, help="Tokens of a response, EOS included.", min=1)
    temperature: float = option(0.7, help="Of sampling, and of every log-probability.", min=1e-3)
    template: str = option(
        "auto",
        help="Put string prompts into the chat template: if there is one, always, never.",
        choices=("auto", "chat", "none"),
    )
    too_long: str = option(
        "error",
        help="A prompt that leaves no room for the response is a bad record, or is dropped.",
        choices=("error", "drop"),
    )
    missing_eos: str = option(
        "subtract",
        help="A response without EOS: replace its score by minus the penalty, subtract it, or let it be.",
        choices=("replace", "subtract", "none"),
    )
    missing_eos_penalty: float = option(1.0, help="What --missing-eos replaces or subtracts.", min=0)
    kl_coef: float = option(0.05, help="Weight of the per-token KL penalty in the reward.", min=0)
    kl_target: float | None = option(
        None, help="Adapt the coefficient towards this KL, in nats a sequence.", min=0
    )
    kl_horizon: int = option(10_000, help="Episodes over which the coefficient adapts.", min=1)
    kl_budget: float | None = option(
        None, help="Stop at the first batch whose KL, in nats a sequence, is above this.", min=0
    )
    gamma: float = option(1.0, help="Discount.", min=0, max=1)
    gae_lambda: float = option(0.95, help="Lambda of generalised advantage estimation.", min=0, max=1)
    whiten_advantages: bool = option(True, help="Shift and scale a batch's advantages to mean 0, std 1.")
    whiten_rewards: bool = option(False, help="Scale a batch's rewards to std 1, keeping their mean.")
    clip_range: float = option(0.2, help="Clip of the probability ratio.", min=0)
    value_clip_range: float = option(0.2, help="Clip of the value's change; 0 for none.", min=0)
    value_coef: float = option(0.1, help="Weight of the value loss.", min=0)
    learning_rate: float | None = option(
        None, help="Adam's first rate; 3e-6 for full, a tenth of the method's own otherwise.", min=0
    )
    value_learning_rate: float | None = option(
        None, help="Of the value model; --learning-rate, but 1e-4 for a head on the policy.", min=0
    )
    schedule: str = option("linear", help="Learning rate over the updates.", choices=("linear", "constant"))
    adam_epsilon: float = option(1e-5, help="Adam's epsilon.", min=0)
    max_grad_norm: float = option(1.0, help="Clip the gradient's norm to this; 0 for never.", min=0)
    lora_rank: int = option(16, help="Rank of LoRA's and its kin's update.", min=1)
    lora_alpha: int | None = option(None, help="LoRA's scale numerator; twice the rank if not given.")
    target_modules: tuple[str, ...] = option((), help="Modules to adapt; all linear layers if not given.")
    dora: bool = option(False, help="Weight-decomposed LoRA (Liu et al. 2024).")
    rslora: bool = option(False, help="Scale by alpha/sqrt(rank) (Kalajdzievski 2023).")
    quantization: str | None = option(
        None,
        help="4-bit storage of the frozen base; nf4-double for qlora.",
        choices=("nf4", "nf4-double", "fp4", "fp4-double"),
    )
    reduction_factor: float = option(16, help="Hidden size over bottleneck size.", min=1)
    virtual_tokens: int = option(20, help="Tokens of prefix, prompt, p-tuning, llama-adapter.", min=1)
    adapter_layers: int | None = option(None, help="Top layers that llama-adapter changes; all.", min=1)
    peft_option: tuple[str, ...] = option((), help="A field of the PEFT config.", metavar="KEY=VALUE")
    eval_every: int = option(0, help="Updates between held-out rewards; 0 for start and end only.", min=0)
    keep: str = option(
        "best",
        help="Which weights to keep: of the best held-out reward, or the last.",
        choices=("best", "last"),
    )
    save_value: bool = option(False, help="Keep the value model's trained weights in the artifact too.")
    reward_timeout: float = option(
        30.0, help="Seconds to wait for a reward over HTTP.", min=0, role="runtime"
    )
    reward_retries: int = option(3, help="Further tries of a reward over HTTP.", min=0, role="runtime")
    trust_remote_code: bool = option(False, help="Run code that the model's folder brings along.")
    samples_every: int = option(10, help="Updates between samples of text in the log; 0 for none.", min=0)
    checkpoint_every: int = option(
        10, help="Updates between resumable checkpoints; 0 for none.", min=0, role="runtime"
    )

    # What the methods can do and PPO cannot use: dropout would make old and new log-probabilities differ.
    lora_dropout = 0.0
    pissa = False
    loraplus_ratio = 1.0
