/* A team of threads that does one piece of work together, phase by phase.
 *
 *   caller: team_run(team, work, arg) -> whoever is awake runs work(member, arg) -> all items are done -> returns
 *
 * The caller is member 0. A phase is a number of items that members take in small runs; it ends when all its items are
 * done, not when all members have come by. A member whose core was given to another process in the meantime therefore
 * holds nobody up, unless it holds items itself; when it comes back it finds the phases done and catches up.
 *
 * Members wait by spinning for a short while, for the next phase of a step is microseconds away; then they sleep, so that
 * an idle engine costs nothing.
 */
#ifndef KVB_TEAM_H
#define KVB_TEAM_H

#include <stdatomic.h>
#include <stdint.h>

#define MAX_PHASES 16384 /* of one run */
#define MAX_OPEN 4       /* phases that a member may begin before it waits for them */

typedef struct team team;

typedef struct {
    atomic_int taken;      /* runs of items handed out */
    atomic_long finished;  /* items done */
} phase;

typedef struct {
    team *team;
    int id, size;
    int next; /* the next phase; equal in all members at the same point of the work */
    int open; /* phases begun and not yet waited for */
    const phase *begun[MAX_OPEN];
    int64_t items[MAX_OPEN];
    double clock;
} member;

typedef void (*team_work)(member *me, const void *arg);

team *team_make(int size);
void team_free(team *t);
void team_run(team *t, team_work work, const void *arg);

/* Nobody goes on before the items of every phase begun so far are done. */
void team_wait(member *me);

typedef struct {
    phase *at;
    int64_t items, chunk, held;
} share;

/* The next phase: items 0..items, handed out in runs of `chunk` to whoever asks first. */
share share_of(member *me, int64_t items, int64_t chunk);

/* The next run [*from, *to), the one taken before being done; 0 when there is none left. Must be asked until then. */
static inline int share_take(share *s, int64_t *from, int64_t *to) {
    if (s->held) atomic_fetch_add_explicit(&s->at->finished, s->held, memory_order_release);
    int64_t at = (int64_t)atomic_fetch_add_explicit(&s->at->taken, 1, memory_order_relaxed) * s->chunk;
    s->held = 0;
    if (at >= s->items) return 0;
    *from = at;
    *to = at + s->chunk < s->items ? at + s->chunk : s->items;
    s->held = *to - *from;
    return 1;
}

#endif
