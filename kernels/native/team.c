/* The threads behind team.h: POSIX threads, C11 atomics, one mutex for those that fell asleep. */
#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

#define SPINS 4000    /* about 100 microseconds */
#define YIELD_EVERY 64 /* past SPINS, inside a step: the member waited for may need this very core */

struct team {
    int size, started;
    atomic_int epoch;    /* counts runs; a change wakes the members */
    atomic_int arrived;  /* members at the barrier */
    atomic_int barriers; /* counts barriers passed */
    atomic_int busy;     /* members still in the run */
    int stop;
    team_work work;
    const void *arg;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    atomic_int counters[MAX_PHASES];
    int used; /* counters that the last run may have touched */
    pthread_t threads[];
};

typedef struct {
    team *team;
    int id;
} seat;

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void spin_until_changed(const atomic_int *value, int seen) {
    for (int i = 0; atomic_load_explicit(value, memory_order_acquire) == seen; i++) {
        pause_briefly();
        if (i > SPINS && i % YIELD_EVERY == 0) sched_yield();
    }
}

static void sleep_until_changed(team *t, int seen) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&t->epoch, memory_order_acquire) != seen) return;
        pause_briefly();
    }
    pthread_mutex_lock(&t->lock);
    while (atomic_load_explicit(&t->epoch, memory_order_acquire) == seen) pthread_cond_wait(&t->wake, &t->lock);
    pthread_mutex_unlock(&t->lock);
}

static void *live(void *arg) {
    seat *mine = arg;
    team *t = mine->team;
    int id = mine->id, epoch = 0;
    free(mine);
    for (;;) {
        sleep_until_changed(t, epoch++);
        if (t->stop) return NULL;
        member me = {t, id, t->size, 0, 0};
        t->work(&me, t->arg);
        atomic_fetch_sub_explicit(&t->busy, 1, memory_order_release);
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
    t->size = size;
    for (t->started = 1; t->started < size; t->started++)
        if (!start(t, t->started)) {
            team_free(t);
            return NULL;
        }
    return t;
}

static void wake_all(team *t) {
    pthread_mutex_lock(&t->lock);
    atomic_fetch_add_explicit(&t->epoch, 1, memory_order_release);
    pthread_cond_broadcast(&t->wake);
    pthread_mutex_unlock(&t->lock);
}

void team_free(team *t) {
    if (!t) return;
    t->stop = 1;
    wake_all(t);
    for (int i = 1; i < t->started; i++) pthread_join(t->threads[i], NULL);
    pthread_cond_destroy(&t->wake);
    pthread_mutex_destroy(&t->lock);
    free(t);
}

int team_size(const team *t) { return t->size; }

void team_run(team *t, team_work work, const void *arg) {
    for (int i = 0; i < t->used; i++) atomic_store_explicit(&t->counters[i], 0, memory_order_relaxed);
    t->work = work;
    t->arg = arg;
    member me = {t, 0, t->size, 0, 0};
    if (t->size > 1) {
        atomic_store_explicit(&t->busy, t->size - 1, memory_order_relaxed);
        wake_all(t);
    }
    work(&me, arg);
    t->used = me.phase;
    for (int i = 0; t->size > 1 && atomic_load_explicit(&t->busy, memory_order_acquire); i++) {
        pause_briefly();
        if (i > SPINS && i % YIELD_EVERY == 0) sched_yield();
    }
}

void team_wait(member *me) {
    team *t = me->team;
    if (me->size == 1) return;
    int seen = atomic_load_explicit(&t->barriers, memory_order_acquire);
    if (atomic_fetch_add_explicit(&t->arrived, 1, memory_order_acq_rel) + 1 == me->size) {
        atomic_store_explicit(&t->arrived, 0, memory_order_relaxed);
        atomic_fetch_add_explicit(&t->barriers, 1, memory_order_release);
        return;
    }
    spin_until_changed(&t->barriers, seen);
}

share share_of(member *me, int64_t items, int64_t chunk) {
    share s = {&me->team->counters[me->phase++ % MAX_PHASES], items, chunk < 1 ? 1 : chunk};
    return s;
}
