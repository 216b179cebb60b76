-- The rows that are set aside. Their columns have no type, so that every value is stored unchanged.
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
