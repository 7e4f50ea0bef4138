"""The lines of a daemon's log, read back."""
import json
import re
import shlex
import time

from conftest import PATIENCE_S

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
LINE = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d (\w+) (.*)$")


def parse_text(line):
    """A line of the text format: its level, event and fields, or its message."""
    level, rest = LINE.match(line).groups()
    words = shlex.split(rest) if rest.startswith(("request ", "engine ", "refusals_left_out ")) else []
    if words:
        return {"level": level, "event": words[0], **dict(word.split("=", 1) for word in words[1:])}
    return {"level": level, "message": rest}


def parse(line):
    return json.loads(line) if line.startswith("{") else parse_text(line)


def poll(condition, what):
    """For what gives no signal: a file that grows."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, what()
        time.sleep(0.01)


def lines_of(daemon):
    text = daemon.log()
    return [parse(line) for line in text[:text.rfind("\n") + 1].splitlines()]


def line_of(daemon, request_id):
    """A call's line is written after its client has heard the end."""
    return poll(lambda: [line for line in lines_of(daemon)
                         if line.get("event") == "request" and line.get("request_id") == request_id], daemon.log)[0]
