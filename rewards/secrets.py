"""What looks like a secret: names of variables, and values. Standard library only.

Worker processes start without variables that look like one, so that a reward function that prints its environment, or
a program that it starts, has none to lose. This is a list of what is refused, not of what is allowed: a function may
need any variable. It is a guard against accidents. A function runs as the user, and finds what the user's files hold.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

ORDINARY = frozenset({"PWD", "OLDPWD", "PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR"})
WORDS = re.compile(
    r"(^|_)(KEYS?|TOKENS?|PASS|PASSWD|PWD|CREDS?|AUTH|AUTHORIZATION|BEARER|COOKIES?|PAT|DSN|JWT|SAS|SESSION|WEBHOOK|NETRC"
    r"|XAUTHORITY|KRB5CCNAME|PGPASSFILE|KUBECONFIG)(_|$)"
)
PARTS = re.compile(
    r"SECRET|PASSW|PASSPHRASE|CREDENTIAL|CONN(ECTION)?_?STR|API_?KEY|PRIVATE_?KEY|ACCESS_?KEY|(TOKEN|KEY)$"
)
SERVICES = ("AWS_", "AZURE_", "GCP_", "GOOGLE_", "CLOUDSDK_", "SSH_", "GPG_", "VAULT_", "OP_", "DOCKER_AUTH")
PUBLIC = re.compile(r"(^|_)CA_?(BUNDLE|CERTS?|INFO|FILE|PATH)(_|$)")  # certificates of authorities
LOOKS = re.compile(
    r"hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}|wandb_v\d+_\w{16,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"
    r"|npm_\w{20,}|pypi-[\w-]{16,}|gsk_\w{16,}|xai-\w{16,}|r8_\w{16,}|dop_v1_\w{16,}|SG\.[\w-]{16,}\.[\w-]{16,}"
    r"|(?<=hooks\.slack\.com/services/)\S+|(?<=[Bb]earer )[\w.~+/-]{16,}=*|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    # of a connection string, or of a URL's query
    r"|(?<=[?&;])(?i:password|pwd|account_?key|shared_?access_?key|api_?key|access_?token|client_?secret|token|sig)=[^\s;&]+"
)
IN_URL = re.compile(r"(?<=://)([^\s/@:]*:[^\s/@]+|[^\s/@:]{20,})(?=@)")  # user:password, or a token alone
SHORTEST = 20  # characters of a secret that is looked for inside of other texts: a region's name is no secret


def names_secret(variable: str) -> bool:
    """Whether a variable of the environment is called like a secret (``WANDB_API_KEY``, ``HF_TOKEN``, ``AWS_…``)."""
    name = variable.upper()
    if name in ORDINARY or PUBLIC.search(name):
        return False
    return name.startswith(SERVICES) or PARTS.search(name) is not None or WORDS.search(name) is not None


def looks_secret(value: str) -> bool:
    """Whether a text has the form of a known kind of key, or is a URL with a password."""
    return LOOKS.search(value) is not None or IN_URL.search(value) is not None


def secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that look like secrets, by their name or their value, or that repeat one of those."""
    others = {name: value for name, value in environment.items() if name.upper() not in ORDINARY}
    found = {name: value for name, value in others.items() if names_secret(name) or looks_secret(value)}
    values = long_enough(found.values())
    repeats = {name: value for name, value in others.items() if any(secret in value for secret in values)}
    return found | repeats


def long_enough(values: Iterable[str]) -> list[str]:
    """Those that are secret wherever they stand: not a path, nor a word."""
    return [value for value in values if len(value) >= SHORTEST and not value.startswith("/")]


def without_secrets(environment: Mapping[str, str], keep: Collection[str] = ()) -> dict[str, str]:
    """The variables for a worker: all but those that look like secrets. Those that ``keep`` names stay."""
    left_out = secrets_of(environment).keys() - set(keep)
    return {name: value for name, value in environment.items() if name not in left_out}
