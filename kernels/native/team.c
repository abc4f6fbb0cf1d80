/* The threads behind team.h: POSIX threads, C11 atomics, one mutex for those that fell asleep.
 *
 * A run has a door. Members enter while it is open; the caller shuts it when all items are done and nobody is inside, so
 * it never waits for a member that has not even woken up.
 */
#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

#define SPINS 4000     /* about 100 microseconds */
#define YIELD_EVERY 64 /* past SPINS, inside a step: the member waited for may need this very core */
#define SHUT (-1)

struct team {
    int size, started;
    atomic_int epoch;    /* counts runs; a change wakes the members */
    atomic_int door;     /* SHUT, or how many members besides the caller are inside */
    atomic_int sleepers;
    atomic_int stop;
    team_work work;
    const void *arg;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    int used; /* phases that the last run may have touched */
    phase phases[MAX_PHASES];
    pthread_t threads[];
};

typedef struct {
    team *team;
    int id;
} seat;

/* One turn of a waiting loop. */
static void linger(int turn) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
    if (turn > SPINS && turn % YIELD_EVERY == 0) sched_yield();
}

static void sleep_until_changed(team *t, int seen) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load(&t->epoch) != seen) return;
        linger(i);
    }
    pthread_mutex_lock(&t->lock);
    atomic_fetch_add(&t->sleepers, 1); /* before the look at epoch: who changes it looks at sleepers after */
    while (atomic_load(&t->epoch) == seen) pthread_cond_wait(&t->wake, &t->lock);
    atomic_fetch_sub(&t->sleepers, 1);
    pthread_mutex_unlock(&t->lock);
}

static void wake_all(team *t) {
    atomic_fetch_add(&t->epoch, 1);
    if (!atomic_load(&t->sleepers)) return;
    pthread_mutex_lock(&t->lock);
    pthread_cond_broadcast(&t->wake);
    pthread_mutex_unlock(&t->lock);
}

static int enter(team *t) {
    int inside = atomic_load(&t->door);
    while (inside != SHUT)
        if (atomic_compare_exchange_weak(&t->door, &inside, inside + 1)) return 1;
    return 0;
}

static void *live(void *arg) {
    seat *mine = arg;
    team *t = mine->team;
    int id = mine->id, epoch = 0;
    free(mine);
    for (;;) {
        sleep_until_changed(t, epoch);
        epoch = atomic_load(&t->epoch);
        if (atomic_load(&t->stop)) return NULL;
        if (!enter(t)) continue;
        member me = {.team = t, .id = id, .size = t->size};
        t->work(&me, t->arg);
        team_wait(&me);
        atomic_fetch_sub(&t->door, 1);
    }
}

static int start(team *t, int id) {
    seat *s = malloc(sizeof *s);
    if (!s) return 0;
    *s = (seat){t, id};
    if (pthread_create(&t->threads[id], NULL, live, s) == 0) return 1;
    free(s);
    return 0;
}

team *team_make(int size) {
    team *t = calloc(1, sizeof *t + sizeof(pthread_t) * (size_t)size);
    if (!t) return NULL;
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->wake, NULL);
    atomic_store(&t->door, SHUT);
    t->size = size;
    for (t->started = 1; t->started < size; t->started++)
        if (!start(t, t->started)) {
            team_free(t);
            return NULL;
        }
    return t;
}

void team_free(team *t) {
    if (!t) return;
    atomic_store(&t->stop, 1);
    wake_all(t);
    for (int i = 1; i < t->started; i++) pthread_join(t->threads[i], NULL);
    pthread_cond_destroy(&t->wake);
    pthread_mutex_destroy(&t->lock);
    free(t);
}

void team_run(team *t, team_work work, const void *arg) {
    for (int i = 0; i < t->used; i++) {
        atomic_store_explicit(&t->phases[i].taken, 0, memory_order_relaxed);
        atomic_store_explicit(&t->phases[i].finished, 0, memory_order_relaxed);
    }
    t->work = work;
    t->arg = arg;
    member me = {.team = t, .size = t->size};
    if (t->size > 1) {
        atomic_store(&t->door, 0);
        wake_all(t);
    }
    work(&me, arg);
    team_wait(&me);
    t->used = me.next;
    for (int i = 0, nobody = 0; t->size > 1 && !atomic_compare_exchange_weak(&t->door, &nobody, SHUT); i++) {
        nobody = 0;
        linger(i);
    }
}

void team_wait(member *me) {
    for (int p = 0; p < me->open; p++)
        for (int i = 0; atomic_load_explicit(&me->begun[p]->finished, memory_order_acquire) < me->items[p]; i++) linger(i);
    me->open = 0;
}

share share_of(member *me, int64_t items, int64_t chunk) {
    phase *at = &me->team->phases[me->next++ % MAX_PHASES];
    if (me->open == MAX_OPEN) team_wait(me);
    me->begun[me->open] = at;
    me->items[me->open++] = items;
    return (share){at, items, chunk < 1 ? 1 : chunk, 0};
}
