"""A server behind `Endpoint`: a real one on this machine, which misbehaves on command."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import pytest

from safe_sched.data.rows import core_rows
from safe_sched.errors import EndpointError, OptionError, SafeSchedError
from safe_sched.generation import TextGenerator, TextReply, TextRequest
from safe_sched.mixing.rewriting import endpoint as module
from safe_sched.mixing.rewriting.endpoint import LARGEST_BODY, Endpoint
from safe_sched.mixing.rewriting.rewrite import rewrite

KEY = "sk-very-secret-0123456789"


def completion(text: Any = "hello", reason: str = "stop", **message: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": reason}
    return {"object": "chat.completion", "choices": [choice], "usage": {"prompt_tokens": 11, "completion_tokens": 7}}


class Server(ThreadingHTTPServer):
    """Answers with what it is scripted to, then with what its function says.

    A line of the script is a status, headers and a body; or a function that is given the handler.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Any] = []
        self.answer: Callable[[dict[str, Any]], Any] = lambda body: (
            200,
            {},
            completion(body["messages"][1]["content"]),
        )
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.times: list[float] = []
        self.lock = threading.Lock()
        self.together = self.most_together = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that went away


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    counted = False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.seen.append((self.path, dict(self.headers), body))
            server.times.append(time.monotonic())
            self.counted = True
            server.together += 1
            server.most_together = max(server.most_together, server.together)
            line = server.script.pop(0) if server.script else server.answer(body)
        try:
            if callable(line):
                line(self)
            else:
                self.send(*line)
        finally:
            self.done()

    def done(self) -> None:
        with self.server.lock:
            self.server.together -= self.counted
            self.counted = False

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers), {}))
        self.send(200, {}, completion("followed"))

    def send(self, status: int, headers: dict[str, str], body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.done()  # before the client knows, who may ask again at once
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def endpoint(server: Server, **changes: Any) -> Endpoint:
    settings: dict[str, Any] = {"api_key_env": None, "max_retries": 2, "timeout": 5.0}
    return Endpoint(server.url, "tiny", **(settings | changes))


def requests(count: int = 1) -> list[TextRequest]:
    return [TextRequest("You rewrite.", f"data {number}", seed=number, max_tokens=50) for number in range(count)]


def one(server: Server, **changes: Any) -> TextReply:
    ((number, reply),) = endpoint(server, **changes).generate(requests())
    assert number == 0
    return reply


ERROR = {"error": {"message": "slow down", "type": "rate_limit"}}

# what is sent ---------------------------------------------------------------------------------------------------------


def test_a_request_is_one_post_with_the_two_turns_apart(server):
    assert one(server) == TextReply("data 0", None, 11, 7)
    ((path, headers, body),) = server.seen
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "tiny",
        "messages": [{"role": "system", "content": "You rewrite."}, {"role": "user", "content": "data 0"}],
        "temperature": 0.7,
        "max_tokens": 50,
        "seed": 0,
    }
    assert "Authorization" not in headers
    assert isinstance(endpoint(server), TextGenerator)


def test_options_change_and_remove_fields(server):
    one(server, options={"seed": None, "max_tokens": None, "max_completion_tokens": 9, "temperature": 0.0})
    body = server.seen[0][2]
    assert (body["max_completion_tokens"], body["temperature"]) == (9, 0.0)
    assert not {"seed", "max_tokens"} & body.keys()


def test_the_key_is_read_from_its_variable_and_sent_as_a_header_alone(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    one(server, api_key_env="MY_KEY")
    _, headers, body = server.seen[0]
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert KEY not in json.dumps(body)


def test_without_a_key_nothing_is_sent(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(OptionError, match="OPENAI_API_KEY is not set to a key.*api_key_env=None"):
        one(server, api_key_env="OPENAI_API_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "two\r\nlines")
    with pytest.raises(OptionError, match="is not set to a key") as caught:
        one(server, api_key_env="OPENAI_API_KEY")
    assert "lines" not in str(caught.value)
    assert not server.seen


def test_no_proxy_and_no_address_of_the_environment_is_used(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert one(server).text == "data 0"
    with httpx2.Client() as client, pytest.raises(httpx2.ConnectError):  # control: the client would use it
        client.post(server.url, json={})


def test_without_the_client_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(OptionError, match=r"pip install 'safe-sched\[rewrite\]'"):
        Endpoint("https://host/v1", "m")


def test_nothing_is_sent_by_building_an_endpoint_or_by_asking_for_its_identity(server):
    built = endpoint(server)
    assert json.loads(json.dumps(dict(built.identity)))["model"] == "tiny"
    built.generate(requests(3))  # an iterator that nobody has begun
    assert not server.seen


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, {"error": {"message": f"Incorrect API key provided: {KEY}."}}),
        (400, {"error": f"bad {KEY}"}),
        (500, f"Traceback: Authorization: Bearer {KEY}".encode()),
        (302, b""),
        (418, {"detail": KEY}),
    ],
)
def test_no_error_and_no_repr_holds_the_key(server, monkeypatch, status, body):
    """A server may echo it; nothing of it may reach a log."""
    monkeypatch.setenv("MY_KEY", KEY)
    server.answer = lambda _: (status, {"Location": f"http://elsewhere/{KEY}?k={KEY}"}, body)
    built = endpoint(server, api_key_env="MY_KEY", max_retries=1)
    with pytest.raises(EndpointError) as caught:
        list(built.generate(requests()))
    error: BaseException | None = caught.value
    while error is not None:
        assert KEY not in str(error)
        assert KEY not in repr(vars(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert KEY not in repr(built)
    assert KEY not in json.dumps(dict(built.identity))
    assert server.seen[0][1]["Authorization"].endswith(KEY)  # control: it was there to leak


# some at a time -------------------------------------------------------------------------------------------------------


def test_every_request_has_its_own_reply_whatever_the_order(server):
    def slow(body: dict[str, Any]) -> Any:
        number = int(body["messages"][1]["content"].split()[1])

        def line(handler: Handler) -> None:
            time.sleep(0.02 * (5 - number % 5))
            handler.send(200, {}, completion(f"reply {number}"))

        return line

    server.answer = slow
    found = list(endpoint(server, concurrency=3).generate(requests(12)))
    assert sorted(found, key=lambda pair: pair[0]) == [(n, TextReply(f"reply {n}", None, 11, 7)) for n in range(12)]
    assert [n for n, _ in found] != list(range(12))
    assert 2 <= server.most_together <= 3


def test_an_error_comes_after_the_replies_that_were_paid_for(server):
    """Of ten requests the third fails: what is under way is finished, nothing else is begun."""
    server.script = [(200, {}, completion("a")), (200, {}, completion("b")), (401, {}, ERROR)]
    replies = endpoint(server, concurrency=1).generate(requests(10))
    assert {next(replies)[1].text, next(replies)[1].text} == {"a", "b"}
    with pytest.raises(EndpointError, match=r"status 401: slow down\): see whether the right key"):
        next(replies)
    assert len(server.seen) == 3


def test_who_stops_listening_stops_the_asking(server):
    replies = endpoint(server, concurrency=1).generate(requests(50))
    next(replies)
    replies.close()  # pyright: ignore[reportAttributeAccessIssue]
    sent = len(server.seen)
    assert sent < 10
    time.sleep(0.1)
    assert len(server.seen) == sent


# what is tried again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        (429, {}, ERROR),
        (500, {}, b"<html>oops</html>"),
        (502, {}, b""),
        (503, {}, ERROR),
        (408, {}, ERROR),
        (200, {}, b"<html>a proxy's page</html>"),
        (200, {}, {"choices": []}),
        (200, {}, {"choices": [{"message": {"content": 7}}]}),
        (200, {}, [1, 2]),
        (200, {}, b"[" * 100_000),
        (200, {}, b"\xff\xfe"),
        (200, {"Transfer-Encoding": "chunked"}, b"zz\r\n"),
        lambda handler: handler.connection.close(),
        lambda handler: handler.wfile.write(b"garbage\r\n\r\n"),
    ],
)
def test_what_may_pass_is_tried_again(server, line):
    server.script = [line, line]
    assert one(server).text == "data 0"
    assert len(server.seen) == 3
    # control: one retry fewer is too few
    server.script = [line, line]
    with pytest.raises(EndpointError, match=r"the server at http://127.*, 2 times\..* run again later to go on"):
        one(server, max_retries=1)


def test_an_answer_that_does_not_end_is_a_timeout(server):
    def drip(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        for _ in range(400):
            handler.wfile.write(b" ")
            time.sleep(0.02)

    server.script = [drip, lambda handler: time.sleep(0.6)]
    begin = time.monotonic()
    assert one(server, timeout=0.3).text == "data 0"
    assert time.monotonic() - begin < 6  # the eight seconds of the drip are not waited for
    server.script = [drip]
    with pytest.raises(EndpointError, match="did not answer within 0.3 seconds"):
        one(server, timeout=0.3, max_retries=0)


def test_a_huge_answer_is_not_read_to_its_end(server):
    server.script = [(200, {}, b" " * (LARGEST_BODY + 1))]
    with pytest.raises(EndpointError, match="more than 4 MiB"):
        one(server, max_retries=0)


def test_waits_double_and_the_server_may_ask_for_more(server, monkeypatch):
    """At least half of 0.1 and of 0.2 seconds; then Retry-After, as a number and as a date, beats a thousandth."""
    server.script = [(500, {}, b""), (500, {}, b"")]
    monkeypatch.setattr(module, "FIRST_WAIT", 0.1)
    one(server)
    first, second, third = server.times
    assert second - first >= 0.05
    assert third - second >= 0.1
    monkeypatch.setattr(module, "FIRST_WAIT", 0.001)
    server.script, server.times = [(429, {"Retry-After": "0.5"}, ERROR)], []
    one(server)
    assert server.times[1] - server.times[0] >= 0.5
    server.script, server.times = [(503, {"Retry-After": formatdate(time.time() + 2, usegmt=True)}, ERROR)], []
    one(server)
    assert server.times[1] - server.times[0] >= 0.9


@pytest.mark.parametrize("given", ["soon", "nan", "-5", ""])
def test_a_senseless_retry_after_is_none(server, given):
    server.script = [(429, {"Retry-After": given}, ERROR)]
    assert one(server).text == "data 0"


def test_a_server_that_asks_to_wait_too_long_stops_the_run(server):
    server.script = [(429, {"Retry-After": "3600"}, ERROR)]
    with pytest.raises(EndpointError, match="asks to wait 3600 seconds; allowed: 120.*run again later"):
        one(server)
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("status", "body", "match"),
    [
        (
            400,
            {"error": {"message": "unknown field seed"}},
            r"status 400: unknown field seed\): see which field .*options",
        ),
        (401, ERROR, "whether the right key is in the variable that api_key_env names"),
        (403, ERROR, "whether the key may use this model"),
        (404, b"not found", "status 404: not found.*often in /v1"),
        (422, {"detail": [{"msg": "no"}]}, "see which field"),
        (418, b"", r"refuses \(status 418\): see what the server says"),
        (429, {"error": {"code": "insufficient_quota", "message": "pay"}}, "there is no money left"),
        (302, b"", "sends elsewhere, to .*/else', which is not followed"),
        (307, b"", "sends elsewhere, to .*/else', which is not followed"),
    ],
)
def test_what_will_not_pass_is_an_error_at_once_with_its_remedy(server, status, body, match):
    server.answer = lambda _: (status, {"Location": server.url + "/else"}, body)
    with pytest.raises(EndpointError, match=match):
        one(server)
    assert len(server.seen) == 1
    assert [path for path, _, _ in server.seen] == ["/v1/chat/completions"]  # no redirect was followed


def test_a_server_s_message_cannot_reach_the_terminal_raw(server):
    server.answer = lambda _: (400, {}, {"error": {"message": "\x1b[2J\u202e" + "x" * 5000}})
    with pytest.raises(EndpointError) as caught:
        one(server)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_a_server_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT", 0.0)
    built = Endpoint("http://127.0.0.1:9/v1", "m", api_key_env=None, max_retries=1)
    with pytest.raises(EndpointError, match=r"at http://127.0.0.1:9/v1 cannot be reached: .*, 2 times"):
        list(built.generate(requests()))


# with the rewriter ----------------------------------------------------------------------------------------------------

TASK = [f"Question: {topic}? Answer yes or no." for topic in ("is rain wet", "do cats bark", "can iron rust", "why so")]


def rewriting(body: dict[str, Any]) -> Any:
    asked = json.loads(body["messages"][1]["content"])["request"].rstrip("?.! ")
    return 200, {}, completion(json.dumps({"prompt": f"Question: {asked}? Answer yes or no."}))


def test_a_dry_run_sends_nothing_to_the_server(server):
    priced = endpoint(server, price_per_million=(1.0, 2.0))
    report = rewrite(core_rows()[:5], TASK, priced, dry_run=True)
    assert report.requests == 5
    assert report.cost == pytest.approx((report.input_tokens + 2 * report.output_tokens) / 1e6)
    assert not server.seen


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_run_that_the_server_ends_goes_on_where_it_was(server, tmp_path, concurrency, monkeypatch):
    """The ninth and all later requests are refused: eight replies are on disk, and twelve more finish the twenty."""
    monkeypatch.setenv("MY_KEY", KEY)
    answered = 0

    def failing(body: dict[str, Any]) -> Any:
        nonlocal answered
        answered += 1  # the server's own lock is held
        return rewriting(body) if answered <= 8 else (403, {}, ERROR)

    server.answer = failing
    how: dict[str, Any] = {"cache": tmp_path / "c", "batch_size": 6}
    built = endpoint(server, concurrency=concurrency, api_key_env="MY_KEY")
    with pytest.raises(EndpointError, match="403"):
        rewrite(core_rows()[:20], TASK, built, **how)
    assert len(server.seen) < 20
    server.answer, before = rewriting, len(server.seen)
    report = rewrite(core_rows()[:20], TASK, built, **how)
    assert (len(server.seen) - before, report.requests, report.from_cache, report.rewritten) == (12, 12, 8, 20)
    assert (report.input_tokens, report.output_tokens, report.estimated) == (12 * 11, 12 * 7, False)
    assert KEY.encode() not in (tmp_path / "c").read_bytes()
    assert KEY not in str(report)


# what fails alone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ((400, {}, {"error": {"code": "content_filter", "message": "m"}}), "the server's filter turned it down"),
        ((400, {}, {"error": {"code": "context_length_exceeded"}}), "it is too long for the model"),
        ((200, {}, completion("half", "content_filter")), "the server's filter turned it down"),
        ((200, {}, completion("half", "length")), "the reply is longer than max_tokens"),
        ((200, {}, completion(None, refusal="No.")), "the model declined"),
        ((200, {}, completion(None)), "the reply is empty"),
    ],
)
def test_a_request_that_is_turned_down_fails_alone(server, line, problem):
    server.script = [line]
    first, second = sorted(endpoint(server, concurrency=1).generate(requests(2)), key=lambda pair: pair[0])
    assert (first[1].text, first[1].problem) == (None, problem)
    assert second[1].text == "data 1"


@pytest.mark.parametrize(
    "usage", [None, [], {"prompt_tokens": "many", "completion_tokens": -1}, {"prompt_tokens": True}]
)
def test_a_senseless_count_of_tokens_is_none(server, usage):
    server.script = [(200, {}, completion("hi") | {"usage": usage})]
    assert one(server) == TextReply("hi", None, None, None)


# options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"base_url": "ftp://host/v1"}, "allowed: an address such as"),
        ({"base_url": "file:///etc/passwd"}, "allowed: an address such as"),
        ({"base_url": "localhost:8000"}, "allowed: an address such as"),
        ({"base_url": "https://"}, "allowed: an address such as"),
        ({"base_url": "https://host:99999999/v1"}, "is no address"),
        ({"base_url": "https://ho st/v1"}, "allowed: an address such as"),
        ({"base_url": "http://host.example/v1"}, "would send the key unencrypted; use https, or api_key_env=None"),
        ({"base_url": "https://host/v1?key=1"}, "a query or a fragment"),
        ({"model": ""}, "model=''"),
        ({"timeout": 0}, "timeout=0; allowed"),
        ({"max_retries": -1}, "max_retries=-1; allowed: 0 to 100"),
        ({"concurrency": 0}, "concurrency=0; allowed: 1 to 64"),
        ({"temperature": 3.0}, "temperature=3.0; allowed: 0 to 2"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"price_per_million": (1.0, -1.0)}, "two numbers >= 0"),
        ({"options": {"messages": []}}, r"options has \['messages'\], which are not free"),
        ({"options": {"tools": []}}, "not free"),
        ({"options": {"x": {1, 2}}}, "options are sent as JSON and cannot be"),
    ],
)
def test_an_option_out_of_range_is_an_error(changes, match):
    settings: dict[str, Any] = {"base_url": "https://host/v1", "model": "m"}
    Endpoint(**settings)  # control
    with pytest.raises(OptionError, match=match):
        Endpoint(**(settings | changes))


def test_a_password_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(OptionError, match="base_url has a user") as caught:
        Endpoint("https://me:hunter2@host/v1", "m")
    assert "hunter2" not in str(caught.value)
    assert issubclass(EndpointError, SafeSchedError)


def test_an_unencrypted_server_needs_no_key_or_this_machine():
    Endpoint("http://host.example/v1", "m", api_key_env=None)
    for host in ("localhost", "127.0.0.1", "[::1]"):
        Endpoint(f"http://{host}:8000/v1", "m")


def test_replies_of_other_models_and_settings_are_kept_apart():
    base = Endpoint("https://host/v1", "m")
    same = Endpoint("https://host/v1/", "m", timeout=1.0, concurrency=9, price_per_million=(1.0, 1.0), api_key_env="X")
    assert base.identity == same.identity
    for changes in (
        {"model": "n"},
        {"temperature": 0.0},
        {"options": {"top_p": 0.5}},
        {"base_url": "https://other/v1"},
    ):
        settings: dict[str, Any] = {"base_url": "https://host/v1", "model": "m"} | changes
        assert Endpoint(**settings).identity != base.identity
