"""Tools: what is offered to an assistant, and its calls, as rows of several tools write them.

Owns the shapes that are read (OpenAI's, bare functions, JSON texts of either) and the one they are
read into: tools wrapped as clients of OpenAI's interface send them, arguments as objects, which is
what servers hand to a chat template.
"""

from typing import Any

from myna.data.conversation import ToolCall
from myna.data.fields import Fields, Unfit, is_blank, list_keys
from myna.data.files import describe


def read_tools(fields: Fields) -> tuple[dict[str, Any], ...] | None:
    """The tools of a row, each `{"type": "function", "function": {"name": …}}`; None without."""
    value, name = fields.json("tools"), fields.name("tools")
    if is_blank(value):
        return None
    if isinstance(value, list):
        value = [
            fields.parse(entry, f"{name}[{at}]") if isinstance(entry, str) else entry
            for at, entry in enumerate(value)
        ]
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Unfit("tools", f"{name} is {describe(value)}; expected a list of JSON schemas.")
    return tuple(_wrapped(tool, f"{name}[{at}]", fields) for at, tool in enumerate(value))


def _wrapped(tool: dict[str, Any], name: str, fields: Fields) -> dict[str, Any]:
    if "function" in tool or "name" not in tool:
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unfit(
                "tool_name",
                f"{name} has {list_keys(tool)} and no function with a name; expected "
                '{"type": "function", "function": {"name": …, "parameters": …}}.',
            )
        return tool
    if not isinstance(tool["name"], str):
        raise Unfit("tool_name", f"{name}.name is {describe(tool['name'])}; expected a text.")
    if tool.get("type") not in (None, "function"):
        return tool  # one that a server knows by its type
    fields.remarks.append(
        'bare tools are wrapped as {"type": "function", "function": …}, as servers are sent them'
    )
    return {
        "type": "function",
        "function": {key: value for key, value in tool.items() if key != "type"},
    }


def read_calls(value: Any, name: str, fields: Fields) -> tuple[ToolCall, ...]:
    """The calls in a `tool_calls` field: a list of calls, or the JSON text of one."""
    if isinstance(value, str) and value.strip():
        value = fields.parse(value, name)
    if is_blank(value):
        return ()
    if not isinstance(value, list):
        raise Unfit("tool_calls", f"{name} is {describe(value)}; expected a list of calls.")
    return tuple(read_call(entry, f"{name}[{at}]", fields) for at, entry in enumerate(value))


def read_call_text(text: str, name: str, fields: Fields) -> tuple[ToolCall, ...]:
    """The calls in the text of a turn of its own (`function_call`): one call or a list of them."""
    value = fields.parse(text, name)
    if isinstance(value, dict):
        return (read_call(value, name, fields),)
    if isinstance(value, list) and value:
        return read_calls(value, name, fields)
    raise Unfit(
        "call_text",
        f'{name} is {describe(value)}; expected a call, {{"name": …, "arguments": {{…}}}}.',
    )


def read_call(entry: Any, name: str, fields: Fields) -> ToolCall:
    """One call: an entry of `tool_calls`, or OpenAI's `function_call` of old."""
    if isinstance(entry, str):
        entry = fields.parse(entry, name)
    call = entry.get("function") if isinstance(entry, dict) and "function" in entry else entry
    called = call.get("name") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(called, str) or not called:
        found = list_keys(call) if isinstance(call, dict) else describe(call)
        raise Unfit(
            "call",
            f'{name} is a call with {found}; expected "name" and "arguments", by themselves or '
            'under "function".',
        )
    identity = entry.get("id")
    if identity is not None and not isinstance(identity, str):
        raise Unfit("call_id", f"{name}.id is {describe(identity)}; expected a text.")
    arguments = call.get("arguments", call.get("parameters"))
    return ToolCall(called, _arguments(arguments, f"{name} ({called})", fields), identity)


def _arguments(value: Any, name: str, fields: Fields) -> dict[str, Any]:
    if isinstance(value, str) and value.strip():
        value = fields.parse(value, f"the arguments of {name}")
    if is_blank(value):
        return {}  # as servers read the empty text of a call without arguments
    if not isinstance(value, dict):
        raise Unfit(
            "arguments",
            f"the arguments of {name} are {describe(value)}; expected an object, or the JSON "
            "text of one.",
        )
    if any(argument is None for argument in value.values()):
        fields.remarks.append(
            "arguments of tool calls hold null; Arrow and Parquet write it for keys that a row "
            "lacks"
        )
    return value
