/* Waiting for a descriptor with every thread of the calling thread's OpenMP team. See cluster/gang.py. */

#include "team.h"
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <unistd.h>

struct waiting {
    pthread_t leader;
    const int *bells;
    int num_bells;
    int fd;
    int timeout_ms;
};

static void wait_in_team(void *data)
{
    const struct waiting *w = data;
    if (pthread_equal(pthread_self(), w->leader)) {
        const uint64_t one = 1;
        for (int i = 0; i < w->num_bells; i++)
            while (write(w->bells[i], &one, sizeof one) < 0 && errno == EINTR)
                ;
    }
    struct pollfd watched = {.fd = w->fd, .events = POLLIN};
    poll(&watched, 1, w->timeout_ms);
}

/* Ring the eventfds `bells`, then sleep until `fd` is readable, for timeout_ms at most, in num_threads threads. */
void switchyard_gang_wait(int fd, int timeout_ms, const int *bells, int num_bells, int num_threads)
{
    struct waiting w = {pthread_self(), bells, num_bells, fd, timeout_ms};
    run_in_team(wait_in_team, &w, num_threads);
}
