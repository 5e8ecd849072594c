"""Models of other people's SDKs that say how many user messages they were shown: a conversation that is remembered, or not."""

from __future__ import annotations

from typing import Any


def openai_agent() -> Any:
    """An agent of the OpenAI Agents SDK."""
    import agents
    from openai.types import responses

    class EchoModel(agents.Model):  # type: ignore[misc]
        """Says how many user messages it was shown."""

        async def get_response(self, system_instructions: Any, input: Any, *_: Any, **__: Any) -> Any:  # noqa: A002
            shown = [one for one in input if one.get("role") == "user"]
            text = responses.ResponseOutputText(text=f"{len(shown)} heard", type="output_text", annotations=[], logprobs=[])
            message = responses.ResponseOutputMessage(
                id=f"m{len(shown)}", content=[text], role="assistant", status="completed", type="message"
            )
            return agents.ModelResponse(output=[message], usage=agents.Usage(), response_id=None)

        def stream_response(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("nobody streams here")

    agents.set_tracing_disabled(True)
    return agents.Agent(name="echo", model=EchoModel())


def strands_model() -> Any:
    """A model of Strands Agents."""
    from strands.models import Model

    class EchoModel(Model):  # type: ignore[misc]
        """Says how many user messages it was shown."""

        def update_config(self, **_: Any) -> None: ...

        def get_config(self) -> dict[str, Any]:
            return {}

        async def structured_output(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("nobody asks for it")
            yield {}

        async def stream(self, messages: Any, *_: Any, **__: Any) -> Any:
            heard = sum(message["role"] == "user" for message in messages)
            yield {"messageStart": {"role": "assistant"}}
            yield {"contentBlockStart": {"start": {}}}
            yield {"contentBlockDelta": {"delta": {"text": f"{heard} heard"}}}
            yield {"contentBlockStop": {}}
            yield {"messageStop": {"stopReason": "end_turn"}}

    return EchoModel()
