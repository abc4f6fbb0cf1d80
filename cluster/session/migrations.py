"""How migrations travel: the ingress's MIGRATE upstream, the engine's MIGRATED and MIGRATION_WANTED downstream."""

from __future__ import annotations

from typing import Any

from kvbaton.cluster.session.fields import index_below, natural, sized, text
from kvbaton.cluster.session.requests import MAX_ID_CHARS, decode_peer, peer_fields
from kvbaton.engine.orders import Migrate, Migrated, MigrationWanted
from kvbaton.engine.request import MAX_SAMPLES

MAX_REASON_CHARS = 1024


def migrate_fields(order: Migrate) -> list[object]:
    return [
        order.request_id,
        order.sample,
        None if order.to is None else peer_fields(order.to),
        order.new_id,
        order.new_epoch,
        order.context_tokens,
    ]


def decode_migrate(fields: list[Any]) -> Migrate:
    request_id, sample, to, new_id, new_epoch, context_tokens = sized("migrate", fields, 6)
    return Migrate(
        text("request id", request_id, MAX_ID_CHARS),
        index_below("sample", sample, MAX_SAMPLES),
        None if to is None else decode_peer(to),
        text("new id", new_id, MAX_ID_CHARS),
        natural("new epoch", new_epoch),
        natural("context tokens", context_tokens),
    )


def migrated_fields(migrated: Migrated) -> list[object]:
    refusal = migrated.refusal
    return [migrated.new_id, migrated.new_epoch, None if refusal is None else refusal[:MAX_REASON_CHARS]]


def decode_migrated(fields: list[Any]) -> Migrated:
    new_id, new_epoch, refusal = sized("migrated", fields, 3)
    return Migrated(
        text("new id", new_id, MAX_ID_CHARS),
        natural("new epoch", new_epoch),
        None if refusal is None else text("refusal", refusal, MAX_REASON_CHARS),
    )


def wanted_fields(wanted: MigrationWanted) -> list[object]:
    return [wanted.request_id, wanted.to]


def decode_wanted(fields: list[Any]) -> MigrationWanted:
    request_id, to = sized("migration wanted", fields, 2)
    return MigrationWanted(
        text("request id", request_id, MAX_ID_CHARS), None if to is None else text("to", to, MAX_ID_CHARS)
    )
