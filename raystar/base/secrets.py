"""What is hidden in everything that is printed, written or recorded."""

from __future__ import annotations

import re

# Up to the last @ before the path; or, after a user's name, up to the next @, since some passwords hold a slash.
_IN_URI = re.compile(r"""((?<![\w+.-])[\w+.-]+://)(?:[^\s/?#"'<>]*|[^\s/?#:@"'<>]*:(?!\d+/)[^\s@"'<>]*)@""")
_NAMES = (
    r"[\w.-]*(?:token|passw(?:or)?d|passphrase|pwd|secret|credentials?|(?:api|access|account|private)[_-]?key)"
    r"(?:[_-](?:key|id|value))*"
)
_NAMES_SECRET = rf"(?<![\w.-]){_NAMES}"
_VALUE = r"""("(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[^\s&;,"')\]}]+)"""
_ASSIGNED = re.compile(rf"""(?i)({_NAMES_SECRET}["']?[ \t]*=[ \t]*){_VALUE}""")
# `/x/api_token: not found` and `secret: expected a folder` are about files, and what follows is no credential.
_SAYS = (
    r"(?:permission denied|(?:expected|cannot|not|no|nothing|already|holds|lies|would|is (?:not|no|there|a|the)|has no|"
    r"missing|truncated|damaged|another|its name|file name too)[ \t]+\S)"
)
_WRITTEN = re.compile(rf"""(?i)((?<![\w./-]){_NAMES}["']?[ \t]*:(?![ \t]+{_SAYS})[ \t]*){_VALUE}""")
_SIGNATURE = re.compile(rf"(?i)((?<![\w.-])[\w.-]*(?:signature|sig)=){_VALUE}")
_AUTHORIZATION = re.compile(r"(?i)(?<!/)(authorization[\"']?[ \t]*[:=][ \t]*[\"']?(?:basic|bearer)?[ \t]*)[^\s,\"']+")
_SECRET = re.compile(_NAMES_SECRET, re.IGNORECASE)
_HIDDEN = "***"


def redact(text: str) -> str:
    """`text` without credentials: those of a URI, and values that are named token, password, api_key and the like."""
    text = _IN_URI.sub(rf"\1{_HIDDEN}@", text)
    text = _AUTHORIZATION.sub(rf"\1{_HIDDEN}", text)
    return _SIGNATURE.sub(_hide, _WRITTEN.sub(_hide, _ASSIGNED.sub(_hide, text)))


def redact_value(name: str, value: str) -> str:
    """The value of a parameter or tag called `name`, without credentials."""
    return _HIDDEN if value and _SECRET.fullmatch(name) else redact(value)


def _hide(match: re.Match[str]) -> str:
    name, value = match.groups()
    # YAML takes a bare *** for a mistake.
    quote = value[0] if value[0] in "\"'" else '"' if ":" in name else ""
    return f"{name}{quote}{_HIDDEN}{quote}"


def in_a_line(error: Exception) -> str:
    """The first line of what an error says, without secrets."""
    return redact((str(error).strip().splitlines() or [type(error).__name__])[0])[:300]
