"""The tables of the durable log, and how values are stored in them."""

from datetime import UTC, datetime, timedelta
from typing import Final

#: Each step migrates from the version of its index to the next. A released step is never changed.
SCHEMA: Final[tuple[str, ...]] = (
    """
    CREATE TABLE log (epoch TEXT NOT NULL);

    CREATE TABLE users (
        id INTEGER PRIMARY KEY,
        user_id TEXT NOT NULL UNIQUE,
        credit INTEGER,                     -- NULL: no balance has been kept
        head INTEGER NOT NULL,
        floor INTEGER NOT NULL,
        floor_id INTEGER NOT NULL
    );

    CREATE TABLE generations (
        id INTEGER PRIMARY KEY,             -- in order of their starts
        generation_id TEXT NOT NULL UNIQUE,
        user INTEGER NOT NULL REFERENCES users,
        kind TEXT NOT NULL,
        order_json BLOB NOT NULL,
        idempotency_key TEXT,
        fingerprint TEXT NOT NULL,
        reserved INTEGER NOT NULL,          -- whether its start took a credit, which a failure gives back
        first_position INTEGER NOT NULL,
        end_position INTEGER,               -- this and the next two: NULL while it runs
        ended_at INTEGER,                   -- microseconds since 1970
        end_event INTEGER,                  -- events.id, and so in order of the ends
        deleted INTEGER NOT NULL DEFAULT 0, -- nothing but its places is left
        undelivered INTEGER NOT NULL DEFAULT 0
    );
    CREATE UNIQUE INDEX generation_of_key ON generations (user, idempotency_key) WHERE idempotency_key IS NOT NULL;
    CREATE INDEX listed_generations ON generations (user, first_position) WHERE deleted = 0;
    CREATE INDEX active_generations ON generations (user, first_position) WHERE end_position IS NULL;
    CREATE INDEX deleted_generations ON generations (user, end_position, first_position) WHERE deleted = 1;
    CREATE INDEX ended_generations ON generations (ended_at, end_event) WHERE ended_at IS NOT NULL;
    CREATE INDEX undelivered_generations ON generations (end_event) WHERE undelivered = 1;

    CREATE TABLE events (
        id INTEGER PRIMARY KEY,             -- in order of the appends
        user INTEGER NOT NULL,
        position INTEGER NOT NULL,
        generation INTEGER NOT NULL REFERENCES generations ON DELETE CASCADE,
        sequence INTEGER NOT NULL,
        event_id INTEGER NOT NULL,
        name TEXT NOT NULL,
        event BLOB                          -- NULL: deleted, and the place is left
    );
    CREATE UNIQUE INDEX event_at_position ON events (user, position);
    CREATE UNIQUE INDEX event_of_sequence ON events (generation, sequence);

    CREATE TABLE grants (
        user INTEGER NOT NULL REFERENCES users,
        idempotency_key TEXT NOT NULL,
        amount INTEGER NOT NULL,
        credit INTEGER NOT NULL,
        until INTEGER NOT NULL,             -- microseconds since 1970
        PRIMARY KEY (user, idempotency_key)
    ) WITHOUT ROWID;
    CREATE INDEX expiring_grants ON grants (until);

    CREATE TABLE sessions (
        id INTEGER PRIMARY KEY,             -- in order of their last save
        pid TEXT NOT NULL UNIQUE,
        user_id TEXT NOT NULL,
        expires_at INTEGER,                 -- microseconds since 1970, as is touched_at
        service INTEGER NOT NULL,
        live INTEGER NOT NULL,
        event_id INTEGER NOT NULL,
        seen INTEGER NOT NULL,
        head INTEGER NOT NULL,
        tag TEXT,
        touched_at INTEGER NOT NULL
    );
    CREATE INDEX sessions_of_user ON sessions (user_id, touched_at);
    CREATE INDEX expiring_sessions ON sessions (touched_at);
    """,
    """
    ALTER TABLE sessions ADD COLUMN untold TEXT NOT NULL DEFAULT '[]';  -- in JSON
    """,
    # The rows that are set aside. Their columns have no type, so that every value is stored unchanged.
    """
    CREATE TABLE damaged_generations (
        tombstone INTEGER NOT NULL REFERENCES generations ON DELETE CASCADE, reason TEXT NOT NULL,
        id, generation_id, user, kind, order_json, idempotency_key, fingerprint, reserved, first_position,
        end_position, ended_at, end_event, deleted, undelivered
    );
    CREATE TABLE damaged_events (
        tombstone INTEGER NOT NULL REFERENCES generations ON DELETE CASCADE,
        id, user, position, generation, sequence, event_id, name, event
    );
    CREATE INDEX damaged_generations_by_tombstone ON damaged_generations (tombstone);
    CREATE INDEX damaged_events_by_tombstone ON damaged_events (tombstone);
""",
    """
    ALTER TABLE generations ADD COLUMN free INTEGER NOT NULL DEFAULT 0;  -- the work of its present stage costs nothing
    """,
    # USER is a reserved word of PostgreSQL. The images of an event were only in the URLs of its JSON.
    """
    ALTER TABLE generations RENAME COLUMN user TO owner;
    ALTER TABLE events RENAME COLUMN user TO owner;
    ALTER TABLE grants RENAME COLUMN user TO owner;
    ALTER TABLE damaged_generations RENAME COLUMN user TO owner;
    ALTER TABLE damaged_events RENAME COLUMN user TO owner;
    ALTER TABLE sessions RENAME COLUMN untold TO open_tombstones;
    ALTER TABLE events ADD COLUMN images TEXT;  -- JSON: the names of its pictures by field; NULL: it has none
    ALTER TABLE damaged_events ADD COLUMN images;
    UPDATE events SET images = found.images FROM (
        SELECT events.id,
            json_group_object(field, substr(url.value, instr(url.value, '/' || generation_id || '-') + 1)) AS images
        FROM events
        JOIN generations ON generations.id = events.generation
        JOIN json_each(iif(json_valid(CAST(event AS TEXT)), CAST(event AS TEXT), '{}')) AS url
        JOIN (
            SELECT 'compositionUrl' AS key, 'composition_url' AS field UNION ALL
            SELECT 'previewUrl', 'preview_url' UNION ALL
            SELECT 'editedImageUrl', 'edited_image_url' UNION ALL
            SELECT 'generatedImageUrl', 'generated_image_url' UNION ALL
            SELECT 'faceSwapUrl', 'face_swap_url'
        ) AS fields ON fields.key = url.key
        WHERE event IS NOT NULL AND url.type = 'text' AND url.value GLOB '*/' || generation_id || '-*'
        GROUP BY events.id
    ) AS found WHERE found.id = events.id;
    """,
    """
    ALTER TABLE generations ADD COLUMN code TEXT;  -- of its failure
    UPDATE generations SET code = (
        SELECT iif(json_valid(CAST(event AS TEXT)), json_extract(CAST(event AS TEXT), '$.code'), NULL) FROM events
        WHERE events.id = end_event AND name = 'generation_failed'
    ) WHERE end_event IS NOT NULL AND deleted = 0;
    CREATE INDEX unfinished_generations ON generations (id) WHERE end_position IS NULL;
    CREATE INDEX generations_of_kind ON generations (kind, id) WHERE deleted = 0;
    CREATE INDEX failed_generations ON generations (id, code) WHERE code IS NOT NULL;
    CREATE INDEX recent_failures ON generations (ended_at, code) WHERE code IS NOT NULL;
    """,
)

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def is_text(value: str) -> bool:
    """Whether SQLite can store the text: it has no lone surrogate, as JSON strings may."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def microseconds(moment: datetime) -> int:
    """Microseconds since 1970, as times are stored."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def moment(microseconds: int) -> datetime:
    """The time that is stored as this number of microseconds since 1970."""
    return _EPOCH + timedelta(microseconds=microseconds)
