"""What language models as text encoders share: token ids and a mask in, one of their hidden states out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .component import Component, Port, Sizes
from .examples import right_padded
from .standin import StandIn, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .component import Config, Runner


class MaskedText(Component):
    """`input_ids, attention_mask (batch, sequence) int64 -> output (batch, sequence, D)`: a hidden state of a decoder."""

    config_class: str
    """Transformers' class of the module's config."""
    output = "last_hidden_state"
    state = -1
    """Which hidden state pipelines take, of all: the embeddings' is the first."""
    plain_state = False
    """Whether pipelines ask for the last hidden state by name, not by its place among all."""

    def inputs(self, config: Config) -> tuple[Port, ...]:  # noqa: ARG002
        return (
            Port("input_ids", "int64", ("batch", "sequence")),
            Port("attention_mask", "int64", ("batch", "sequence")),
        )

    def outputs(self, config: Config) -> tuple[Port, ...]:
        return (Port(self.output, "float32", ("batch", "sequence", self.text_config(config)["hidden_size"])),)

    def text_config(self, config: Config) -> Config:
        """Return the text model's own config."""
        return config

    def text_model(self, module: nn.Module) -> nn.Module:
        """Return the module that makes hidden states of tokens."""
        return module

    def flat(self, module: nn.Module) -> nn.Module:
        return _FlatText(self.text_model(module), self.state)

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        """Return tokens in rows of different lengths, padded on the right, as tokenizers do."""
        generator = torch.Generator().manual_seed(seed)
        words = self.text_config(config)["vocab_size"]
        ids = torch.randint(words, (sizes.batch, sizes.sequence), generator=generator)
        return {"input_ids": ids, "attention_mask": right_padded(sizes)}

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        import transformers

        made = getattr(transformers, self.config_class)(**config)
        return _TextStandIn(next(iter(runners.values())), made, self)


class _FlatText(nn.Module):
    def __init__(self, module: nn.Module, state: int) -> None:
        super().__init__()
        self.module = module
        self.state = state

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        last = self.state == -1
        output = self.module(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=not last, use_cache=False
        )
        return (output.last_hidden_state if last else output.hidden_states[self.state],)


class _TextStandIn(StandIn):
    def __init__(self, runner: Runner, config: Any, component: MaskedText) -> None:  # noqa: ANN401 - Transformers' config
        super().__init__(runner, config)
        self._component = component

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        output_hidden_states: bool = False,  # noqa: FBT001, FBT002 - Transformers' own signature
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Return a model output with nothing but the hidden state that the part has, where the pipeline looks for it."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        component = self._component
        options.pop("return_dict", None)
        asked = f"output_hidden_states={output_hidden_states}"
        refuse("text encoder", {asked: output_hidden_states is component.plain_state, **options})
        ids, mask = (tensor.to(torch.int64) for tensor in (input_ids, attention_mask))
        state = self._run(input_ids=ids, attention_mask=mask)[component.output]
        if component.plain_state:
            return BaseModelOutputWithPast(last_hidden_state=state)
        return BaseModelOutputWithPast(hidden_states=(state, *[None] * (-component.state - 1)))
