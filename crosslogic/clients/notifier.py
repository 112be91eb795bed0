"""Where notifications go: Slack, Discord, any webhook, e-mail. Each channel takes one or raises Unavailable."""

from __future__ import annotations

import asyncio
import smtplib
from collections.abc import Awaitable, Callable
from email.message import EmailMessage
from functools import partial
from urllib.parse import unquote, urlsplit

import httpx

from crosslogic.domain.errors import Unavailable
from crosslogic.settings import Settings

TIMEOUT_S = 10.0

Channel = Callable[[str, str, str], Awaitable[None]]


class Notifier:
    """The channels that the settings name. A message's key goes with it, so that a webhook can tell repetitions."""

    def __init__(self, settings: Settings) -> None:
        self._http = httpx.AsyncClient(timeout=TIMEOUT_S)
        self.channels: dict[str, Channel] = {}
        for name, url, body in (
            ("slack", settings.notify_slack_url, _for_slack),
            ("discord", settings.notify_discord_url, _for_discord),
            ("webhook", settings.notify_webhook_url, _plain),
        ):
            if url is not None:
                self.channels[name] = partial(self._post, name, url.get_secret_value(), body)
        if settings.notify_smtp_url is not None and settings.notify_email_to:
            self.channels["email"] = partial(
                self._mail, settings.notify_smtp_url.get_secret_value(), settings.notify_email_to
            )

    async def _post(
        self, channel: str, url: str, body: Callable[[str, str, str], dict[str, str]], key: str, title: str, text: str
    ) -> None:
        try:
            answer = await self._http.post(url, json=body(key, title, text))
        except httpx.HTTPError as error:
            # Without its words: the URL is a secret.
            raise Unavailable(f"{channel} cannot be reached ({type(error).__name__}).") from None
        if not answer.is_success:
            raise Unavailable(f"{channel} answered {answer.status_code}.")

    async def _mail(self, url: str, to: str, key: str, title: str, text: str) -> None:
        try:
            await asyncio.to_thread(_send_mail, url, to, key, title, text)
        except (OSError, smtplib.SMTPException) as error:
            raise Unavailable(f"e-mail cannot be sent ({type(error).__name__}).") from None

    async def close(self) -> None:
        """Let go of connections."""
        await self._http.aclose()


def _for_slack(key: str, title: str, text: str) -> dict[str, str]:
    return {"text": f"*{title}*\n{text}"}


def _for_discord(key: str, title: str, text: str) -> dict[str, str]:
    return {"content": f"**{title}**\n{text}"}


def _plain(key: str, title: str, text: str) -> dict[str, str]:
    return {"key": key, "title": title, "text": text}


def _send_mail(url: str, to: str, key: str, title: str, text: str) -> None:
    parts = urlsplit(url)
    message = EmailMessage()
    message["Subject"], message["From"], message["To"] = title, unquote(parts.username or "") or to, to
    message["X-CrossLogic-Key"] = key
    message.set_content(text)
    kind = smtplib.SMTP_SSL if parts.scheme == "smtps" else smtplib.SMTP
    with kind(parts.hostname or "localhost", parts.port or 0, timeout=TIMEOUT_S) as server:
        if parts.scheme == "smtp+starttls":
            server.starttls()
        if parts.password is not None:
            server.login(unquote(parts.username or ""), unquote(parts.password))
        server.send_message(message)
