/* A team of threads that runs one function together, with barriers and shared counters inside it.
 *
 *   caller: team_run(team, work, arg) -> every member runs work(member, arg) -> all are done -> returns
 *
 * The caller is member 0. Members wait by spinning for a short while, for the next phase of a step is microseconds away;
 * then they sleep, so that an idle engine costs nothing. A team of one has no threads and no waits.
 */
#ifndef KVB_TEAM_H
#define KVB_TEAM_H

#include <stdatomic.h>
#include <stdint.h>

#define MAX_PHASES 16384 /* work counters of one run */

typedef struct team team;

typedef struct {
    team *team;
    int id, size;
    int phase; /* the next unused counter; equal in all members at the same point of the work */
    double clock;
} member;

typedef void (*team_work)(member *me, const void *arg);

team *team_make(int size);
void team_free(team *t);
void team_run(team *t, team_work work, const void *arg);
int team_size(const team *t);

/* Nobody goes on before everybody is here. */
void team_wait(member *me);

typedef struct {
    atomic_int *next;
    int64_t items, chunk;
} share;

/* Items 0..items of one phase, handed out in runs of `chunk` to whoever asks first. */
share share_of(member *me, int64_t items, int64_t chunk);

/* The next run [*from, *to); 0 when there is none left. */
static inline int share_take(const share *s, int64_t *from, int64_t *to) {
    int64_t at = (int64_t)atomic_fetch_add_explicit(s->next, 1, memory_order_relaxed) * s->chunk;
    if (at >= s->items) return 0;
    *from = at;
    *to = at + s->chunk < s->items ? at + s->chunk : s->items;
    return 1;
}

#endif
