"""The one tool of these tests, in the forms of the three protocols; small models need the one choice it leaves."""

from typing import Any

NAME = "get_weather"
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Boston"]}},
    "required": ["city"],
    "additionalProperties": False,
}
QUESTION = "What is the weather in Boston?"
RESULT = "sunny, 22 degrees"
FUNCTION: dict[str, Any] = {"name": NAME, "description": "The weather in a city", "parameters": PARAMETERS}
OPENAI: list[Any] = [{"type": "function", "function": FUNCTION}]
RESPONSES: list[Any] = [{"type": "function", "strict": True, **FUNCTION}]
ANTHROPIC: list[Any] = [{"name": NAME, "description": FUNCTION["description"], "input_schema": PARAMETERS}]
