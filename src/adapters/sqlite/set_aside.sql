-- Turns the generations with the row ids in the JSON array :keys into tombstones, and keeps copies of their rows.
INSERT INTO damaged_generations
SELECT id, 'it cannot be read', id, generation_id, owner, kind, order_json, idempotency_key, fingerprint, reserved,
    first_position, end_position, ended_at, end_event, deleted, undelivered
FROM generations WHERE id IN (SELECT value FROM json_each(:keys));

INSERT INTO damaged_events
SELECT generation, id, owner, position, generation, sequence, event_id, name, event, images
FROM events WHERE generation IN (SELECT value FROM json_each(:keys));

-- Those whose user has no row belong to a user whose id no real user has. The next row id may be that of the lost row.
INSERT OR IGNORE INTO users (id, user_id, head, floor, floor_id)
SELECT -4611686018427387904, '', 0, 0, 0 WHERE :keys != '[]';

UPDATE generations SET owner = (SELECT id FROM users WHERE user_id = '')
WHERE id IN (SELECT value FROM json_each(:keys)) AND owner NOT IN (SELECT id FROM users);

-- Only valid positions of the user's feed are kept, without their events.
DELETE FROM events WHERE generation IN (SELECT value FROM json_each(:keys)) AND NOT EXISTS (
    SELECT 1 FROM generations JOIN users ON users.id = generations.owner
    WHERE generations.id = generation AND events.owner = users.id
    AND typeof(position) = 'integer' AND position BETWEEN 1 AND head
    AND typeof(event_id) = 'integer' AND event_id >= 0
);

UPDATE OR REPLACE events SET sequence = -position, name = '', event = NULL, images = NULL
WHERE generation IN (SELECT value FROM json_each(:keys));

-- Clients may still show what has no valid end as running: append one, so that every cursor comes to it.
INSERT INTO events (owner, generation, sequence, position, event_id, name)
SELECT owner, generations.id, 0, head + row_number() OVER (PARTITION BY owner), random() & 0x7fffffffffffffff, ''
FROM generations JOIN users ON users.id = owner
WHERE generations.id IN (SELECT value FROM json_each(:keys))
AND coalesce(end_position, 0) IS NOT (SELECT max(position) FROM events WHERE generation = generations.id);

UPDATE users SET head = max(head, (SELECT max(position) FROM events WHERE owner = users.id))
WHERE id IN (SELECT owner FROM generations WHERE id IN (SELECT value FROM json_each(:keys)));

UPDATE generations SET
    (first_position, end_position) = (SELECT min(position), max(position) FROM events WHERE generation = generations.id),
    generation_id = iif(
        typeof(generation_id) = 'text' AND generation_id NOT GLOB '*[^a-z0-9_]*',
        generation_id, 'damaged_0_' || id
    ),
    ended_at = iif(
        typeof(ended_at) = 'integer' AND ended_at BETWEEN 0 AND unixepoch() * 1000000, ended_at, unixepoch() * 1000000
    ),
    kind = 'edit', order_json = x'', idempotency_key = NULL, fingerprint = '', reserved = 0, free = 0, deleted = 1,
    undelivered = 0, code = NULL, end_event = NULL
WHERE id IN (SELECT value FROM json_each(:keys));
