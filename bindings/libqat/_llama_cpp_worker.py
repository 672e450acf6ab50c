"""The process behind ``libqat.llama_cpp``: llama.cpp apart from torch, whose OpenMP threads it would fight.

Reads one JSON request a line from standard input, answers with JSON lines on standard output:
``{"progress": [done, total]}`` any number of times, then ``{"result": ...}`` or ``{"error": "..."}``.
"""

import sys

sys.path.pop(0)  # this file's folder: its modules must not stand in for installed ones of the same name

import json
import os
import urllib.request
from collections.abc import Callable
from typing import Any

# With this much added, greedy decoding picks the token whatever the model says. The log-probability that the
# server returns is the one before the addition.
_FORCE = 1000.0
_LISTED = (100, 3000, 1 << 20)  # the last is more than any vocabulary

Send = Callable[[dict[str, Any]], None]


def open_server(settings: dict[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["gguf"]
    params.n_ctx = settings["context"]
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = settings["threads"]
    params.cpuparams_batch.n_threads = settings["threads"]
    params.warmup = False
    params.cache_ram_mib = 0
    return xllamacpp.Server(params)


def complete(server: Any, **request: Any) -> dict[str, Any]:
    answer = server.handle_completions(request)
    if "choices" not in answer:
        raise RuntimeError(f"llama.cpp answered {answer}")
    return answer["choices"][0]


def generate(server: Any, request: dict[str, Any], send: Send) -> str:
    del send
    choice = complete(server, prompt=request["prompt"], max_tokens=request["n_tokens"], temperature=0)
    return choice["text"]


def forced(server: Any, prompt: list[int], token: int, listed: int = 1) -> list[dict[str, Any]] | None:
    """Makes the server choose `token`; what it reports of it, then of the `listed` likeliest tokens.

    None when the token's bytes are not whole characters: the server then reports nothing.
    """
    choice = complete(
        server,
        prompt=prompt,
        max_tokens=1,
        temperature=0,
        logprobs=listed,
        logit_bias=[[token, _FORCE]],
        cache_prompt=True,
    )
    if choice["logprobs"] is None:
        return None
    [chosen] = choice["logprobs"]["content"]
    if chosen["id"] != token:
        raise RuntimeError(f"expected token {token}, llama.cpp chose {chosen['id']}")
    return [chosen, *chosen["top_logprobs"]]


def log_probability(server: Any, prompt: list[int], token: int) -> float:
    reported = forced(server, prompt, token)
    if reported is not None:
        return reported[0]["logprob"]
    # Part of a character: force a whole one and look the token up among the likeliest. Long lists are slow.
    [letter] = tokenize(server, {"text": "a", "add_special": False})
    for listed in _LISTED:
        for entry in forced(server, prompt, letter, listed):
            if entry["id"] == token:
                return entry["logprob"]
    raise RuntimeError(f"llama.cpp reports no log-probability of token {token}")


def score(server: Any, request: dict[str, Any], send: Send) -> list[float]:
    tokens = request["tokens"]
    scores = []
    for index in range(1, len(tokens)):
        scores.append(log_probability(server, tokens[:index], tokens[index]))
        send({"progress": [index, len(tokens) - 1]})
    return scores


def likeliest(server: Any, request: dict[str, Any], send: Send) -> list[list[tuple[int, float]]]:
    tokens, count = request["tokens"], request["count"]
    [letter] = tokenize(server, {"text": "a", "add_special": False})
    found = []
    for index in range(1, len(tokens) + 1):
        _, *listed = forced(server, tokens[:index], letter, count)
        found.append([(entry["id"], entry["logprob"]) for entry in listed])
        send({"progress": [index, len(tokens)]})
    return found


def tokenize(server: Any, request: dict[str, Any], send: Send | None = None) -> list[int]:
    del send
    body = {"content": request["text"], "add_special": request["add_special"], "parse_special": True}
    return post(server, "/tokenize", body)["tokens"]


def chat_prompt(server: Any, request: dict[str, Any], send: Send) -> str:
    del send
    return post(server, "/apply-template", {"messages": request["messages"]})["prompt"]


def chat(server: Any, request: dict[str, Any], send: Send) -> str:
    del send
    body = {"messages": request["messages"], "max_tokens": request["n_tokens"], "temperature": 0}
    return post(server, "/v1/chat/completions", body)["choices"][0]["message"]["content"]


def post(server: Any, route: str, body: dict[str, Any]) -> dict[str, Any]:
    call = urllib.request.Request(
        server.listening_address + route,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(call) as answer:
        return json.load(answer)


def main() -> None:
    # llama.cpp may write to standard output; the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    actions = {
        "generate": generate,
        "score": score,
        "likeliest": likeliest,
        "tokenize": tokenize,
        "chat_prompt": chat_prompt,
        "chat": chat,
    }
    server = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["action"] == "open":
                server = open_server(request)
                send({"result": True})
            else:
                send({"result": actions[request["action"]](server, request, send)})
        except Exception as error:
            send({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
