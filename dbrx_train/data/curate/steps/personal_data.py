"""Personal data and credentials masked: e-mail and IP addresses, telephone numbers, keys.

The placeholders are StarCoder's (arXiv 2305.06161, section 4.3), so that a model learns that something was
there and not what.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dbrx_train.data.curate.batch import Batch
from dbrx_train.data.curate.step import Step
from dbrx_train.options import option

__all__ = ["PersonalData"]

# On both sides of an @, which is found first: an expression for the whole would be tried at every letter
_LOCAL = re.compile(r"(?<![\w.+-])[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_+-])?\Z")
_DOMAIN = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,6}[A-Za-z]{2,24}(?![\w-])")
_LONGEST_LOCAL = 64
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){0,6}(?![\w:])")
# +49 30 1234567, +1 (415) 555-0132, (415) 555-0132, 415-555-0132: with a plus, or in North America's form
_PHONE = re.compile(
    r"(?<![\w+./-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"
    r"|\(\d{3}\) ?\d{3}[.-]\d{4}|\d{3}-\d{3}-\d{4})(?![\w-]|\.\d)"
)
_KEY = re.compile(
    r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----[A-Za-z0-9+/=\s:,-]{16,8192}?-----END (?:[A-Z]+ )*PRIVATE KEY"
    r"-----"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS
    r"|\bgh[pousr]_[A-Za-z0-9]{36,255}\b|\bgithub_pat_[A-Za-z0-9_]{22,255}\b"
    r"|\bglpat-[A-Za-z0-9_-]{20,}|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bhf_[A-Za-z0-9]{30,}\b"
    r"|\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{20,}|\b[rs]k_live_[A-Za-z0-9]{16,}\b|\bAIza[A-Za-z0-9_-]{35}(?![\w-])"
    r"|\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"  # a JSON web token
)
# A cheap look for what each must have spares most texts the expression
_KEY_MARKS = (
    *("PRIVATE KEY", "AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-"),
    *("xoxa-", "xoxb-", "xoxp-", "xoxr-", "xoxs-", "hf_", "sk-", "k_live_", "AIza", "eyJ"),
)
_IPV4_MARK = re.compile(r"[0-9]\.[0-9]{1,3}\.[0-9]")
_IPV6_MARK = re.compile(r"[0-9A-Fa-f]:[0-9A-Fa-f:]")
_PHONE_MARK = re.compile(r"\+[0-9][0-9 .()-]{7}|[0-9]-[0-9]{3}-[0-9]{4}|\([0-9]{3}\) ?[0-9]{3}")


def _always(_: str) -> bool:
    return True


def _public(address: str) -> bool:
    """Whether it is an address of somebody's: not a version, a private or a documentary one."""
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


@dataclass
class PersonalData(Step):
    """Mask personal data; removes no document."""

    name = "personal_data"
    email: bool = option("Mask e-mail addresses.", True)
    ip: bool = option("Mask IP addresses that are public.", True)
    phone: bool = option("Mask telephone numbers, international or North American.", True)
    keys: bool = option("Mask private keys and access tokens of known forms.", True)
    email_mask: str = option("What takes an address's place.", "<EMAIL>")
    ip_mask: str = option("What takes an IP address's place.", "<IP_ADDRESS>")
    phone_mask: str = option("What takes a number's place.", "<PHONE>")
    key_mask: str = option("What takes a key's place.", "<KEY>")

    @property
    def totals(self) -> tuple[str, ...]:
        return tuple(f"personal_data.{name}" for name in ("keys", "emails", "ips", "phones"))

    def annotate(self, batch: Batch, work: Path) -> Batch:
        counts: dict[str, list[int]] = {name: [] for name in self.totals}
        texts = []
        for text in batch.texts:
            for name, mask in zip(
                self.totals, (self._keys, self._emails, self._ips, self._phones), strict=True
            ):
                text, count = mask(text)
                counts[name].append(count)
            texts.append(text)
        return batch.with_texts(texts).with_columns(counts)

    def _keys(self, text: str) -> tuple[str, int]:
        if not self.keys or not any(mark in text for mark in _KEY_MARKS):
            return text, 0
        return _masked(_KEY, text, self.key_mask)

    def _emails(self, text: str) -> tuple[str, int]:
        if not self.email or "@" not in text:
            return text, 0
        return _masked_emails(text, self.email_mask)

    def _ips(self, text: str) -> tuple[str, int]:
        if not self.ip:
            return text, 0
        count = 0
        if _IPV4_MARK.search(text) is not None:
            text, count = _masked(_IPV4, text, self.ip_mask, _public)
        if _IPV6_MARK.search(text) is None:
            return text, count
        text, more = _masked(_IPV6, text, self.ip_mask, _public)
        return text, count + more

    def _phones(self, text: str) -> tuple[str, int]:
        if not self.phone or _PHONE_MARK.search(text) is None:
            return text, 0
        return _masked(_PHONE, text, self.phone_mask)


def _masked_emails(text: str, mask: str) -> tuple[str, int]:
    parts, done, at = list[str](), 0, text.find("@")
    while at >= 0:
        domain = _DOMAIN.match(text, at + 1)
        before = text[max(done, at - _LONGEST_LOCAL - 1) : at] if domain else ""
        if domain and (local := _LOCAL.search(before)) is not None:
            parts += [text[done : at - len(local[0])], mask]
            done = domain.end()
        at = text.find("@", at + 1)
    return "".join([*parts, text[done:]]), len(parts) // 2


def _masked(
    pattern: re.Pattern[str], text: str, mask: str, fits: Callable[[str], bool] = _always
) -> tuple[str, int]:
    """The text with what matches, and fits, masked; and how often."""
    count = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal count
        if not fits(match[0]):
            return match[0]
        count += 1
        return mask

    return pattern.sub(replace, text), count
