"""Records in every format that step 2 reads, with what they become; and records it cannot convert, with why."""

ROUND = ('你好，"世界"\n第二行', "hello\tworld")  # the round that every format below carries
SHAREGPT = {"from": "human", "value": ROUND[0]}, {"from": "gpt", "value": ROUND[1]}
CHAT = {"role": "user", "content": ROUND[0]}, {"role": "assistant", "content": ROUND[1]}
OPENAI = {"messages": list(CHAT)}
SYSTEM = {"from": "system", "value": "Be kind."}
EARLIER = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}


QUESTION, REPLY = ROUND
PARTS = [{"type": "text", "text": line} for line in QUESTION.split("\n")]
FORMATS = [
    ("alpaca", {"instruction": QUESTION, "input": "", "output": REPLY}, [*SHAREGPT]),
    ("alpaca", {"instruction": QUESTION, "output": REPLY, "text": "x"}, [*SHAREGPT]),
    (
        "alpaca",
        {"instruction": QUESTION, "input": "about", "output": REPLY},
        [{**SHAREGPT[0], "value": f"{QUESTION}\n\nabout"}, SHAREGPT[1]],
    ),
    (
        "alpaca",
        {"instruction": QUESTION, "output": REPLY, "history": [["a", "b"]], "system": "Be kind."},
        [SYSTEM, *EARLIER, *SHAREGPT],
    ),
    ("openai", OPENAI, [*SHAREGPT]),
    ("openai", {"messages": [{"role": "developer", "content": "Be kind."}, *CHAT, *CHAT]}, [SYSTEM, *SHAREGPT * 2]),
    ("openai", {"messages": [{**CHAT[0], "content": PARTS}, CHAT[1]]}, [*SHAREGPT]),
    ("openai", {"prompt": "x", "prompt_id": "y", **OPENAI}, [*SHAREGPT]),
    ("openai", list(CHAT), [*SHAREGPT]),
    ("prompt_response (prompt -> response)", {"prompt": QUESTION, "response": REPLY}, [*SHAREGPT]),
    ("prompt_response (question -> answer)", {"Question": QUESTION, "Answer": REPLY}, [*SHAREGPT]),
    ("prompt_response (query -> answer)", {"query": QUESTION, "answer": REPLY}, [*SHAREGPT]),
    ("prompt_response (prompt -> completion)", {"prompt": QUESTION, "completion": REPLY}, [*SHAREGPT]),
    ("prompt_response (input -> output)", {"input": QUESTION, "output": REPLY}, [*SHAREGPT]),
    (
        "prompt_response (question -> response)",
        {"system_prompt": "Be kind.", "question": QUESTION, "response": REPLY},
        [SYSTEM, *SHAREGPT],
    ),
    (
        "prompt_response (instruction -> response)",
        {"instruction": QUESTION, "context": "about", "response": REPLY},
        [{**SHAREGPT[0], "value": f"{QUESTION}\n\nabout"}, SHAREGPT[1]],
    ),
    ("ultrachat", {"id": "0", "data": [*ROUND, *ROUND]}, [*SHAREGPT * 2]),
    ("ultrachat", [*ROUND], [*SHAREGPT]),
    ("sharegpt", {"conversations": [*SHAREGPT]}, [*SHAREGPT]),
    ("sharegpt", {"conversation": [*SHAREGPT], "system": "Be kind."}, [SYSTEM, *SHAREGPT]),
    ("sharegpt", {"conversations": list(CHAT)}, [*SHAREGPT]),
    ("sharegpt", {"conversations": [SYSTEM, {"user": QUESTION, "assistant": REPLY}]}, [SYSTEM, *SHAREGPT]),
    *(
        ("sharegpt", {"conversations": [SHAREGPT[0], {"from": role, "value": REPLY}]}, [*SHAREGPT])
        for role in ("assistant", "chatgpt", "bard", "bing", "GPT")
    ),
]

#: Among records like OPENAI.
DROPPED = [
    ({"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "calls a tool"),
    ({"messages": [CHAT[0], {**CHAT[1], "function_call": {"name": "f"}}]}, "calls a tool"),
    ({"messages": [*CHAT, {"role": "tool", "content": "x"}]}, "calls a tool"),
    ({"messages": [*CHAT, {"role": "function", "content": "x"}]}, "calls a tool"),
    ({"messages": [CHAT[0], {**CHAT[1], "content": [{"type": "tool_use", "name": "f"}]}]}, "calls a tool"),
    ({"messages": [{**CHAT[0], "content": [*PARTS, {"type": "image_url", "image_url": {}}]}, CHAT[1]]}, "an image"),
    ({**OPENAI, "images": ["a.png"]}, "an image"),
    ({"messages": [CHAT[0], {**CHAT[1], "content": " \n"}]}, "replies are empty"),
    ({"messages": [CHAT[0], {**CHAT[1], "content": "\ud83d"}]}, "not valid Unicode"),
    ({"messages": [CHAT[0], {"role": "alien", "content": "x"}]}, "none of human"),
    ({"messages": [CHAT[0], {"role": "assistant"}]}, "no 'from' or no 'value'"),
    ({"messages": [CHAT[0], "text"]}, "no 'from' or no 'value'"),
    ({"messages": []}, "no turns"),
    ({"messages": [CHAT[0]]}, "no reply by the assistant"),
    ({"messages": None}, "not shaped like"),
    ({"instruction": QUESTION, "output": REPLY}, "not shaped like"),
    (None, "not shaped like"),
]
